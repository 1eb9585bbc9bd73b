# SPDX-License-Identifier: Apache-2.0
"""A long run of a real segmenter under changing goals, watched all the time: `virst soak`."""

from virst_ros.soak.command import command as command
