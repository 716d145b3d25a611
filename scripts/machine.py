"""Says on what something was measured."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine() -> str:
    """Processor, cores and, if there is one, GPU."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{processor}, {os.cpu_count()} cores"


def versions() -> str:
    """Of what the speed depends on."""
    packages = ("torch", "transformers", "accelerate", "hf-mbp")
    return f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages)
