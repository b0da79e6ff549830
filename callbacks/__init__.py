"""One paper per file: callbacks whose constructors fill the five slots; and a monitor of memory by part."""

from apportion.callbacks.badam import BAdam
from apportion.callbacks.hft import HFT
from apportion.callbacks.ist import IST
from apportion.callbacks.lisa import LISA
from apportion.callbacks.memory import MemoryMonitor
from apportion.callbacks.owlore import OwLore
from apportion.callbacks.rst import RST

__all__ = ["HFT", "IST", "LISA", "RST", "BAdam", "MemoryMonitor", "OwLore"]
