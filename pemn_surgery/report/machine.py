"""What measured figures depend on: date, machine, versions."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch


def environment(*more: str) -> dict[str, Any]:
    """Return what measured figures depend on: date, machine, versions (``more`` packages' too)."""
    libraries = ("torch", "torchvision", "timm", "transformers", "peft", "datasets", "scikit-learn")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": _accelerator(),
        },
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ("pemn-surgery", *libraries, *more)},
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _accelerator() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
