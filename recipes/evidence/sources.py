"""Where the data folder of the evidence comes from: public repositories at fixed commits."""

from __future__ import annotations

from pathlib import Path

SOURCES: dict[str, tuple[str, str, str]] = {
    "trec": ("yaolu/ordered-prompt", "e93f70d0a5f6a8cfcadf6f2917c26eed265cd0be", "data/trec"),
    "sst2": ("forest-snow/alps", "3c7ef2c98249fc975a897b27f275695f97d5b7a9", "data/SST-2"),
    "mrpc": (
        "wasiahmad/paraphrase_identification",
        "88b208d0d094ab945d2401d9393531be1fec0076",
        "dataset/msr-paraphrase-corpus",
    ),
    "rte": ("yaolu/ordered-prompt", "e93f70d0a5f6a8cfcadf6f2917c26eed265cd0be", "data/rte"),
    "e2e": ("tuetschek/e2e-dataset", "ab0d967dd5729ce455ef14ba9ffafc456a335264", ""),
    "gsm8k": ("openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c", "grade_school_math/data"),
    "llamafactory_demo": ("hiyouga/LLaMA-Factory", "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30", "data"),
    "self_instruct": (
        "yizhongw/self-instruct",
        "0b26ccaa415992100fa32df62d41b994cf928e23",
        "human_eval",
    ),
    "wikitext2": (
        "pytorch/examples",
        "77f55b912142e11fcfdf5b530231fb9c52f181e8",
        "word_language_model/data/wikitext-2",
    ),
    "tinyshakespeare": ("karpathy/char-rnn", "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e", "data/tinyshakespeare"),
    "pubmedqa": ("pubmedqa/pubmedqa", "1cbae8e92f72f20c8d3747cbb3bf5bc53554d997", "data"),
}
"""Folders of the data folder, each with a GitHub repository, a commit of it and the folder there."""


def listed() -> list[str]:
    """A Markdown list of them.

    Example:
        >>> listed()[4]
        '- `e2e/`: https://github.com/tuetschek/e2e-dataset/tree/ab0d967dd5729ce455ef14ba9ffafc456a335264'
    """
    made = []
    for folder, (repository, commit, path) in SOURCES.items():
        address = f"https://github.com/{repository}/tree/{commit}/{path}".rstrip("/")
        made.append(f"- `{folder}/`: {address}")
    return made


def located(data: Path, file: str) -> Path:
    """A file of the data folder.

    Raises:
        FileNotFoundError: If it is not there; says where it comes from.
    """
    path = data / file
    if not path.is_file():
        repository, commit, folder = SOURCES[file.partition("/")[0]]
        place = folder or "the top folder"
        raise FileNotFoundError(
            f"`--data {data}` has no {file}: it is in {place} of github.com/{repository} at {commit[:7]}."
        )
    return path
