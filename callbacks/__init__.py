"""One paper per file: callbacks whose constructors fill the five slots; and a monitor of memory by part."""

from apportion.callbacks.adalora import AdaLoRA
from apportion.callbacks.badam import BAdam
from apportion.callbacks.bitfit import BitFit
from apportion.callbacks.diffora import DiffoRA
from apportion.callbacks.fish import FISH
from apportion.callbacks.hft import HFT
from apportion.callbacks.id3 import ID3
from apportion.callbacks.increlora import IncreLoRA
from apportion.callbacks.ist import IST
from apportion.callbacks.lift import LIFT
from apportion.callbacks.lisa import LISA
from apportion.callbacks.memory import MemoryMonitor
from apportion.callbacks.owlore import OwLore
from apportion.callbacks.pafi import PaFI
from apportion.callbacks.random_entries import Random
from apportion.callbacks.rst import RST
from apportion.callbacks.sara import SaRA
from apportion.callbacks.sift import SIFT
from apportion.callbacks.spider import SPIDER, SPIDERHard
from apportion.callbacks.spt import SPT
from apportion.callbacks.triadapt import TriAdaptLoRA
from apportion.callbacks.trpts import TRPTS
from apportion.callbacks.ttc import TTC

__all__ = [
    "FISH",
    "HFT",
    "ID3",
    "IST",
    "LIFT",
    "LISA",
    "RST",
    "SIFT",
    "SPIDER",
    "SPT",
    "TRPTS",
    "TTC",
    "AdaLoRA",
    "BAdam",
    "BitFit",
    "DiffoRA",
    "IncreLoRA",
    "MemoryMonitor",
    "OwLore",
    "PaFI",
    "Random",
    "SPIDERHard",
    "SaRA",
    "TriAdaptLoRA",
]
