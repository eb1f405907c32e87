"""In the emulator's process: load the emulated kernels before any test."""

from __future__ import annotations

import os

import emulation

if emulation.LIBRARY_VARIABLE in os.environ:
    emulation.load_library(os.environ[emulation.LIBRARY_VARIABLE])
