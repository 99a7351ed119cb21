"""RunPod's REST API v2 on this machine: pods are real processes, faults are had on demand."""

from emulators.runpod.catalog import Gpu
from emulators.runpod.emulator import Emulator, serve
from emulators.runpod.pods import PodTruth
from emulators.runpod.settings import Image, Settings, find_spec

__all__ = ["Emulator", "Gpu", "Image", "PodTruth", "Settings", "find_spec", "serve"]
