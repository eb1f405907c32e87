#!/usr/bin/env bash
# Keep an experiment's report among the results, without its models and arrays.
#
#   benchmarks/keep_experiment.sh RUN RESULTS
set -euo pipefail
mkdir -p "$2"
rm -rf "$2/figures"
cp -r "$1/figures" "$1/results.json" "$1/results.csv" "$1/report.md" "$2"
