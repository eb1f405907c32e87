#!/usr/bin/env bash
# A hash of the C++ and CUDA sources: whether prepared parts are made of those that are here.
cd "$(dirname "${BASH_SOURCE[0]}")/.." && find csrc -type f | LC_ALL=C sort | xargs sha256sum | sha256sum
