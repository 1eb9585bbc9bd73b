# SPDX-License-Identifier: Apache-2.0
"""A scripted run of the faults that robots meet, against a real segmenter process: `virst faults`."""
