"""The LightningModules of the tasks: what they log, what they learn, and how tokens are counted."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import transformers
from torch import nn
from torchmetrics.classification import MulticlassMatthewsCorrCoef

from apportion.recipes.tasks import fits, packing
from apportion.recipes.tasks.answering import QuestionAnswering, best_span
from apportion.recipes.tasks.answers import Answer, continued
from apportion.recipes.tasks.images import ImageData
from apportion.recipes.tasks.instructions import InstructionData
from apportion.recipes.tasks.metrics import Majority, Matthews
from apportion.recipes.tasks.module import CausalLM, ImageClassification, Seq2SeqLM, SequenceClassification
from apportion.recipes.tasks.pairs import Seq2SeqData
from apportion.recipes.tasks.spans import QuestionAnsweringData
from apportion.recipes.tasks.text import CausalTextData, TextClassificationData
from apportion.recipes.tasks.tokens import byte_tokenizer, load_tokenizer

MakeTrainer = Callable[..., pl.Trainer]
SIZES = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {"model_type": "bert", "num_labels": 2, **SIZES, **HEADS}
LLAMA = {"model_type": "llama", "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, **SIZES, **HEADS}
T5 = {"model_type": "t5", "vocab_size": 384, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_labels": 3, **SIZES, **HEADS}


def adam(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.AdamW(params, lr=lr)


def test_the_tokenizer_of_bytes_is_byt5s() -> None:
    ours, theirs = byte_tokenizer(), transformers.ByT5Tokenizer()
    for words in ["", "two  words\n\t", "é 漢字 🙂 \x00", "</x>"]:
        assert ours(words)["input_ids"] == theirs(words)["input_ids"]
        assert ours(words, "b")["input_ids"] == theirs(words, "b")["input_ids"]
        assert ours.decode(ours(words)["input_ids"], skip_special_tokens=True) == words


def test_a_saved_tokenizer_is_loaded(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("é")["input_ids"] == byte_tokenizer()("é")["input_ids"]


class Fixed(nn.Module):
    """Stands in for a model whose logits are given, batch after batch."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = iter(outputs)
        self.config = transformers.BertConfig()

    def forward(self, **batch: Any) -> Any:
        return next(self.outputs)


def evaluated(module: Any, batches: list[Any], outputs: list[Any], trainer: pl.Trainer) -> dict[str, float]:
    module.model = Fixed([transformers.utils.ModelOutput(**output) for output in outputs])
    (metrics,) = trainer.validate(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    return dict(metrics)


def test_classification_says_what_the_most_frequent_class_would_reach(quiet_trainer: MakeTrainer) -> None:
    labels, chosen = [[1, 1, 1], [0, 1]], [[1, 0, 1], [0, 0]]
    batches = [{"labels": torch.tensor(part)} for part in labels]
    outputs = [
        {"loss": torch.tensor(v), "logits": torch.eye(2)[part]} for v, part in zip((1.0, 2.0), chosen, strict=True)
    ]
    metrics = evaluated(SequenceClassification(config=BERT), batches, outputs, quiet_trainer())
    assert metrics["val/loss"] == pytest.approx((3 * 1.0 + 2 * 2.0) / 5)
    assert metrics["val/accuracy"] == pytest.approx(3 / 5)
    assert metrics["val/majority"] == pytest.approx(4 / 5)
    assert metrics["val/f1"] == pytest.approx(2 * 1.0 * 0.5 / 1.5)  # of class 1: precision 2/2, recall 2/4
    assert metrics["val/matthews"] == pytest.approx((2 * 1 - 0 * 2) / (2 * 4 * 1 * 3) ** 0.5)


def test_more_than_two_classes_have_the_mean_of_their_f1(quiet_trainer: MakeTrainer) -> None:
    batches = [{"labels": torch.tensor([0, 1, 2, 2])}]
    outputs = [{"loss": torch.tensor(1.0), "logits": torch.eye(3)[[0, 2, 2, 2]]}]
    metrics = evaluated(SequenceClassification(config=BERT | {"num_labels": 3}), batches, outputs, quiet_trainer())
    assert metrics["val/f1"] == pytest.approx((1.0 + 0.0 + 0.8) / 3)


def test_a_second_validation_counts_anew(quiet_trainer: MakeTrainer) -> None:
    module, batches = SequenceClassification(config=BERT), [{"labels": torch.tensor([1, 1, 0])}]
    first, second = (
        evaluated(module, batches, [{"loss": torch.tensor(1.0), "logits": torch.eye(2)[chosen]}], quiet_trainer())
        for chosen in ([0, 0, 0], [1, 1, 0])
    )
    assert (first["val/f1"], second["val/f1"]) == (0.0, 1.0)


def test_every_split_starts_counting_anew() -> None:
    majority = Majority(2)
    majority.update(torch.tensor([0, 0]))
    majority.reset()
    majority.update(torch.tensor([1, 0, 1]))
    assert majority.compute() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("chosen", "right", "value"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 0], 0.0),  # always the same class
        ([1, 0, 1, 0], [1, 1, 1, 1], 0.0),
        ([1, 1], [1, 1], 0.0),
        ([0, 1, 1, 0], [0, 1, 1, 0], 1.0),
        ([1, 0, 0, 1], [0, 1, 1, 0], -1.0),
    ],
)
def test_matthews_correlation_is_zero_without_a_spread(chosen: list[int], right: list[int], value: float) -> None:
    matthews = Matthews(2)
    matthews.update(torch.tensor(chosen), torch.tensor(right))
    assert matthews.compute().item() == pytest.approx(value)


def test_matthews_correlation_is_that_of_torchmetrics_elsewhere() -> None:
    draw = torch.Generator().manual_seed(0)
    for classes in (2, 3, 6):
        ours, theirs = Matthews(classes), MulticlassMatthewsCorrCoef(classes)
        for _ in range(2):
            chosen, right = torch.randint(classes, (2, 40), generator=draw)
            ours.update(chosen, right)
            theirs.update(chosen, right)
        assert ours.compute().item() == pytest.approx(theirs.compute().item(), abs=1e-6)


def test_metrics_are_exact_under_a_model_in_half_precision(quiet_trainer: MakeTrainer) -> None:
    losses = [1.0 + (i % 3) for i in range(700)]  # a sum in bfloat16 would stop to grow at 512
    batches = [{"labels": torch.tensor([1, 0, 1])} for _ in losses]
    outputs = [{"loss": torch.tensor(v), "logits": torch.eye(2)[[1, 1, 1]]} for v in losses]
    trainer = quiet_trainer(precision="bf16-true")
    metrics = evaluated(SequenceClassification(config=BERT), batches, outputs, trainer)
    assert metrics["val/loss"] == pytest.approx(sum(losses) / 700, rel=1e-5)
    assert metrics["val/majority"] == pytest.approx(2 / 3)
    assert metrics["val/accuracy"] == pytest.approx(2 / 3)


def test_regression_has_correlations(quiet_trainer: MakeTrainer) -> None:
    module = SequenceClassification(regression=True, config=BERT | {"num_labels": 1})
    assert module.objective == "val/pearson"
    batches = [{"labels": torch.tensor(part)} for part in ([1.0, 2.0], [3.0, 4.0])]
    logits = [[[1.0], [2.0]], [[9.0], [4.0]]]
    outputs = [{"loss": torch.tensor(1.0), "logits": torch.tensor(part)} for part in logits]
    metrics = evaluated(module, batches, outputs, quiet_trainer())
    assert metrics["val/pearson"] == pytest.approx(8 / (5 * 38) ** 0.5, rel=1e-5)
    assert metrics["val/spearman"] == pytest.approx(0.8)


@pytest.mark.parametrize(("regression", "outputs"), [(True, 2), (False, 1)])
def test_regression_needs_one_output(regression: bool, outputs: int) -> None:
    with pytest.raises(ValueError, match=f"num_labels={outputs}"):
        SequenceClassification(regression=regression, config=BERT | {"num_labels": outputs})


def test_texts_are_given_numbers(quiet_trainer: MakeTrainer) -> None:
    rows = [{"text": "x" * (1 + i % 4), "label": float(i % 4)} for i in range(32)]
    data = TextClassificationData(rows, rows, regression=True, batch_size=8)
    module = SequenceClassification(regression=True, config=BERT | {"num_labels": 1}, optimizer=adam(3e-3))
    trainer = quiet_trainer(max_epochs=15)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/pearson"] > 0.9


def test_labels_are_held_against_the_model(quiet_trainer: MakeTrainer) -> None:
    texts = [{"text": "a", "label": 0}, {"text": "b", "label": 2}]
    with pytest.raises(ValueError, match=r"row 2 holds the label 2 in column 'label', which must lie in \[0, 1\]"):
        quiet_trainer(max_steps=1).fit(SequenceClassification(config=BERT), TextClassificationData(texts, texts))
    images = [{"image": [[0]], "label": label} for label in (0, 3)]
    with pytest.raises(ValueError, match=r"row 2 holds the label 3 in column 'label', which must lie in \[0, 2\]"):
        quiet_trainer(max_steps=1).fit(ImageClassification(config=VIT), ImageData(images, images, size=8))


def test_samples_are_held_against_the_model(quiet_trainer: MakeTrainer) -> None:
    rows = [{"text": "x" * 30, "label": 0}, {"text": "y", "label": 1}]
    short = SequenceClassification(config=BERT | {"max_position_embeddings": 16})
    with pytest.raises(
        ValueError, match=r"has 31 tokens, and the model has 16 positions: `data\.length` must be at most 16"
    ):
        quiet_trainer(max_epochs=1).fit(short, TextClassificationData(rows, rows))
    quiet_trainer(max_epochs=1).fit(short, TextClassificationData(rows, rows, length=16))
    few = SequenceClassification(config=BERT | {"vocab_size": 100})
    with pytest.raises(ValueError, match=r"token 124 is none of the 100 of the model"):
        quiet_trainer(max_epochs=1).fit(few, TextClassificationData(rows, rows))


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (transformers.BertConfig(**TINY, max_position_embeddings=40), 40),
        (transformers.RobertaConfig(**TINY, max_position_embeddings=42, pad_token_id=1), 40),
        (transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=40), 40),
        (transformers.OPTConfig(**TINY, ffn_dim=32, max_position_embeddings=40), 40),
        (transformers.LlamaConfig(**TINY), None),
        (transformers.T5Config(vocab_size=64, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_learned_positions_are_all_that_a_model_can_read(config: Any, positions: int | None) -> None:
    model = transformers.AutoModel.from_config(config)
    assert fits.positions(model) == positions
    assert fits.tokens(model) == 64
    if positions is not None and config.model_type != "t5":
        model(torch.full((1, positions), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, positions + 1), 5))


def test_null_leaves_a_saved_configuration_alone(tmp_path: Path) -> None:
    SequenceClassification(config=BERT | {"num_labels": 3}).model.save_pretrained(tmp_path)
    for given, classes in ((None, 3), (5, 5)):
        config = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        assert config["vocab_size"] == 384
        options = {"num_labels": given, "ignore_mismatched_sizes": True} if given else {"num_labels": None}
        assert SequenceClassification(path=str(tmp_path), config=options).model.config.num_labels == classes


def test_images_are_learned(quiet_trainer: MakeTrainer) -> None:
    rows = [{"image": [[(i % 3) * 100] * 8] * 8, "label": i % 3} for i in range(24)]
    data = ImageData(rows, rows, size=8, batch_size=8)
    trainer = quiet_trainer(max_epochs=8)
    trainer.fit(ImageClassification(config=VIT, optimizer=adam(3e-3)), data)
    assert trainer.callback_metrics["val/accuracy"] == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("... #### 72", 72),
        ("#### 1,250 apples, or 3", 1250),
        ("He pays $5.50.", Decimal("5.5")),
        ("from 3 to -4", -4),
        ("no 7 here ####", 7),
        ("3 #### none 9", 9),
        ("0.50", Decimal("0.5")),
        ("nothing", None),
    ],
)
def test_the_final_number_is_found(text: str, answer: Decimal | None) -> None:
    assert Answer("number").of(text) == answer


def test_answers_are_compared_by_their_form() -> None:
    assert Answer("number").same("so 72.0", "#### 72")
    assert not Answer("number").same("nothing", "nothing")
    assert Answer("text").same(" the  answer\n", "the answer")
    assert not Answer("text").same("The answer", "the answer")
    assert Answer(r"answer\d|true|false").same("It is ANSWER2, not answer1", "the correct answer is answer2")
    with pytest.raises(ValueError, match=r"`model\.answer='\('`"):
        Answer("(")


FACTS = [{"instruction": letter, "output": f"is {number}"} for number, letter in enumerate("abcdef")]


def facts(**options: Any) -> InstructionData:
    settings: dict[str, Any] = {"prompt": "{instruction}=", "prompt_alone": None, "length": 16, "batch_size": 3}
    return InstructionData(FACTS, FACTS, **(settings | options))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_language_model_learns_to_answer(packed: bool, quiet_trainer: MakeTrainer) -> None:
    module = CausalLM(config=LLAMA, optimizer=adam(1e-2), answer="number", new_tokens=4)
    assert module.objective == "val/exact_match"
    data = facts(packing=packed, batch_size=2 if packed else 6)
    trainer = quiet_trainer(max_epochs=50, check_val_every_n_epoch=50, num_sanity_val_steps=0)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/exact_match"] == 1.0
    assert trainer.callback_metrics["val/loss"] < 0.1


def test_what_is_written_does_not_depend_on_the_batch() -> None:
    module = CausalLM(config=LLAMA)
    module.eval()
    tokenizer = byte_tokenizer()
    prompts = [
        torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"]) for words in ("a", "bcdefg", "hij")
    ]
    together = continued(module.model, tokenizer, prompts, 6)
    assert together == [continued(module.model, tokenizer, [prompt], 6)[0] for prompt in prompts]


@pytest.mark.parametrize("mask", [True, False])
def test_a_packed_row_gives_the_logits_of_its_parts(mask: bool) -> None:
    data, plain = facts(packing=True, mask_prompt=mask), facts(mask_prompt=mask)
    for module in (data, plain):
        module.setup("fit")
    language = CausalLM(config=LLAMA)
    one, other = (language(**part.collate(part.train)).loss for part in (data, plain))
    assert one.item() == pytest.approx(other.item(), abs=1e-5)


def test_a_model_that_looks_across_the_border_is_refused(quiet_trainer: MakeTrainer) -> None:
    module = CausalLM(config=LLAMA)
    forward = module.model.model.forward

    def seeing(*args: Any, **kwargs: Any) -> Any:  # with a mask, transformers does not look at the positions
        return forward(*args, **kwargs | {"attention_mask": torch.ones_like(kwargs["input_ids"])})

    module.model.model.forward = seeing
    with pytest.raises(ValueError, match="looks from one sequence of a row into the one before"):
        quiet_trainer(max_steps=1).fit(module, facts(packing=True))
    quiet_trainer(max_steps=1).fit(module, facts())
    bloom = transformers.BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="BloomForCausalLM takes no `position_ids`"):
        packing.check(transformers.BloomForCausalLM(bloom), module)


class Steps(pl.Callback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))


def gradients(data: Any, quiet_trainer: MakeTrainer, make: Callable[[], Any], accumulate: int) -> list[torch.Tensor]:
    torch.manual_seed(3)
    steps = Steps()
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[steps], limit_val_batches=0)
    trainer.fit(make(), data)
    return steps.gradients


@pytest.mark.parametrize("task", ["instructions", "seq2seq"])
def test_every_token_of_an_accumulated_step_counts_the_same(task: str, quiet_trainer: MakeTrainer) -> None:
    rows = [{"instruction": "q", "output": "a" * (1 + 5 * i % 14)} for i in range(14)]

    def data(size: int) -> Any:
        if task == "instructions":
            return InstructionData(rows, rows, batch_size=size, prompt_alone="{instruction}")
        return Seq2SeqData(rows, rows, source="instruction", target="output", batch_size=size)

    def make() -> Any:
        return CausalLM(config=LLAMA) if task == "instructions" else Seq2SeqLM(config=T5, generate=False)

    whole = gradients(data(6), quiet_trainer, make, accumulate=1)
    parts = gradients(data(2), quiet_trainer, make, accumulate=3)
    assert len(whole) == len(parts) == 3  # the last of two samples, in one batch of the three
    assert float(whole[0].norm()) > 0.1
    # The first two steps of AdamW from equal gradients are equal, and so is what the later ones start from.
    for one, other in zip(whole, parts, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-4


def test_the_last_step_of_a_shortened_epoch_has_fewer_tokens(quiet_trainer: MakeTrainer) -> None:
    rows = [{"instruction": "q", "output": "a" * (1 + 5 * i % 14)} for i in range(14)]
    data = InstructionData(rows, rows, batch_size=2, prompt_alone="{instruction}")
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=2, limit_train_batches=3, limit_val_batches=0)
    told: list[tuple[float, int]] = []

    class Told(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            told.append((float(batch["weight"]), int(module.count(batch))))

    trainer.callbacks.append(Told())  # type: ignore[attr-defined]
    trainer.fit(CausalLM(config=LLAMA), data)
    (first, a), (second, b), (third, c) = told
    assert first == second == (a + b) / 2
    assert third == c / 2


def test_a_scheduler_of_accumulation_is_refused(quiet_trainer: MakeTrainer) -> None:
    changing = pl.callbacks.GradientAccumulationScheduler({0: 2})
    with pytest.raises(ValueError, match=r"stays the same\. Use `trainer\.accumulate_grad_batches`"):
        quiet_trainer(max_epochs=1, callbacks=[changing]).fit(CausalLM(config=LLAMA), facts())
    rows = [{"text": "ab"[i % 2], "label": i % 2} for i in range(8)]
    trainer = quiet_trainer(max_epochs=1, callbacks=[changing])
    trainer.fit(SequenceClassification(config=BERT), TextClassificationData(rows, rows))  # samples count the same


def test_answers_need_prompts(quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 50)
    data = CausalTextData(str(tmp_path / "a.txt"), str(tmp_path / "a.txt"), length=16)
    with pytest.raises(ValueError, match=r"model\.answer=number.*no prompts"):
        quiet_trainer(max_epochs=1).fit(CausalLM(config=LLAMA, answer="number"), data)


def test_a_decoder_sorts_a_text_by_itself_whatever_stands_beside_it(quiet_trainer: MakeTrainer) -> None:
    rows = [{"text": "ab" * (1 + 3 * (i % 5)), "label": i % 2} for i in range(20)]
    module = SequenceClassification(config=LLAMA | {"num_labels": 2, "pad_token_id": 2})  # the tokenizer's is 0
    losses = []
    for size in (1, 4, 20):
        data = TextClassificationData(rows, rows, batch_size=size)
        (metrics,) = quiet_trainer().validate(module, data, verbose=False)
        losses.append(metrics["val/loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_without_accumulation_a_batch_is_told_nothing() -> None:
    data = facts()
    data.setup("fit")
    assert "weight" not in next(iter(data.train_dataloader()))


def test_an_encoder_and_decoder_learn_to_write(quiet_trainer: MakeTrainer) -> None:
    rows = [{"source": letter * 3, "target": f"{letter} {letter}"} for letter in "abcd"]
    data = Seq2SeqData(rows * 4, rows, batch_size=4, length=8, target_length=8)
    module = Seq2SeqLM(config=T5, optimizer=adam(1e-2), new_tokens=6)
    trainer = quiet_trainer(max_epochs=25, check_val_every_n_epoch=25, num_sanity_val_steps=0)
    trainer.fit(module, data)
    metrics = trainer.callback_metrics
    assert metrics["val/exact_match"] == 1.0
    assert metrics["val/rouge1"] == metrics["val/rouge2"] == metrics["val/rougeL"] == 1.0


def test_rouge_compares_words_in_order(quiet_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    written = iter([["the cat sat", "x"]])
    monkeypatch.setattr("apportion.recipes.tasks.module.written_by", lambda *args, **kwargs: None)
    monkeypatch.setattr("apportion.recipes.tasks.module.decoded", lambda *args: next(written))
    batch = {"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2, 3).long(), "reference": ["sat the cat", "x"]}
    module = Seq2SeqLM(config=T5)
    metrics = evaluated(module, [batch], [{"loss": torch.tensor(1.0), "logits": torch.zeros(2, 3)}], quiet_trainer())
    assert metrics["val/rouge1"] == pytest.approx(1.0)
    assert metrics["val/rougeL"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["val/rouge2"] == pytest.approx((1 / 2 + 0) / 2)
    assert metrics["val/exact_match"] == 0.5


QA = [
    {"question": "Who?", "context": context, "answers": {"text": ["up"], "answer_start": [context.index("up")]}}
    for context in ("Ada is up and Bob is in.", "Bob is in, Cy is up here.")
]


def test_answers_are_marked_and_the_best_window_wins(quiet_trainer: MakeTrainer) -> None:
    data = QuestionAnsweringData(QA * 8, QA, length=22, stride=4, batch_size=8)
    module = QuestionAnswering(config=BERT, optimizer=adam(5e-3))
    assert module.objective == "val/f1"
    trainer = quiet_trainer(max_epochs=25, check_val_every_n_epoch=25, num_sanity_val_steps=0)
    trainer.fit(module, data)
    assert len(data.val[0]["windows"]) > 1
    assert trainer.callback_metrics["val/exact_match"] == 100.0


def test_squads_scores_count_questions_and_words(quiet_trainer: MakeTrainer) -> None:
    data = QuestionAnsweringData(
        [*QA, QA[0] | {"answers": {"text": [], "answer_start": []}}], QA, length=60, stride=4, batch_size=3
    )
    data.setup("fit")
    rows = [*data.val, {**data.val[0], "reference": [""]}]
    batch = data.collate(rows)

    def at(*tokens: int) -> torch.Tensor:
        logits = torch.zeros(3, batch["input_ids"].shape[1])
        logits[torch.arange(3), list(tokens)] = 9.0
        return logits

    # After the question and the end token come the characters: "is up" for "up", "up" for "up", nothing for nothing.
    outputs = {"start_logits": at(5 + 4, 5 + 17, 0), "end_logits": at(5 + 8, 5 + 18, 0)}
    metrics = evaluated(
        QuestionAnswering(config=BERT), [batch], [{"loss": torch.tensor(1.0), **outputs}], quiet_trainer()
    )
    assert metrics["val/exact_match"] == pytest.approx(100 * 2 / 3)
    assert metrics["val/f1"] == pytest.approx(100 * (2 / 3 + 1 + 1) / 3)


def test_a_question_has_no_answer_if_every_window_says_so(quiet_trainer: MakeTrainer) -> None:
    data = QuestionAnsweringData(QA, QA, length=22, stride=4)
    data.setup("fit")
    batch = data.collate(data.val[:1])
    (windows,) = batch["counts"]
    assert windows > 1

    def answered(unanswerable: bool, nulls: list[float]) -> float:
        logits = torch.zeros(windows, batch["input_ids"].shape[1])
        logits[0, 5 + 7], logits[:, 0] = 3.0, torch.tensor(nulls)
        other = torch.zeros_like(logits)
        other[0, 5 + 8] = 3.0
        output = {"loss": torch.tensor(1.0), "start_logits": logits, "end_logits": other}
        module = QuestionAnswering(config=BERT, unanswerable=unanswerable)
        return evaluated(module, [batch], [output], quiet_trainer())["val/exact_match"]

    high, mixed = [9.0] * windows, [9.0] * (windows - 1) + [5.0]
    assert [answered(False, high), answered(True, high), answered(True, mixed)] == [100.0, 0.0, 100.0]


@pytest.mark.parametrize("wrong", [{"answer_length": 0}, {"candidates": 0}])
def test_counts_of_answers_start_at_one(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        QuestionAnswering(config=BERT, **wrong)


def test_an_answer_does_not_end_before_it_begins() -> None:
    offsets = [None, (0, 3), (3, 4)]
    starts, ends = torch.tensor([0.0, 0.0, 4.0]), torch.tensor([0.0, 3.0, 0.0])
    assert best_span(starts, ends, offsets) == (4.0, (3, 4))
    assert best_span(starts, ends, offsets, candidates=1) == (float("-inf"), None)


def test_norms_and_biases_can_be_kept_out_of_weight_decay() -> None:
    module = CausalLM(config=LLAMA | {"attention_bias": True}, no_decay=True, optimizer=adam(1e-3))
    decayed, others = module.configure_optimizers().param_groups
    assert decayed["weight_decay"] > 0
    assert others["weight_decay"] == 0.0
    names = {p: name for name, p in module.named_parameters()}
    assert all(name.endswith("bias") or "norm" in name for name in (names[p] for p in others["params"]))
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    (one,) = CausalLM(config=LLAMA, optimizer=adam(1e-3)).configure_optimizers().param_groups
    assert one["weight_decay"] > 0


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (lambda peft: QuestionAnswering(config=BERT, peft=peft), "qa_outputs"),
        (lambda peft: SequenceClassification(config=BERT, peft=peft), "classifier"),
    ],
)
def test_a_fresh_head_trains_beside_adapters(make: Callable[[Any], Any], head: str) -> None:
    from peft import LoraConfig

    module = make(LoraConfig(r=2, target_modules="all-linear"))
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert any(head in name and "lora" not in name for name in trained)
    assert all("lora" in name or head in name for name in trained)
