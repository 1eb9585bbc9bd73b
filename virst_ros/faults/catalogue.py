# SPDX-License-Identifier: Apache-2.0
"""All faults. Those of the reasoner's process come first, then everything that both kinds of reasoner serve."""

from virst_ros.faults import camera_faults, depth_faults, pair_faults, process_faults, reasoner_faults, request_faults
from virst_ros.faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *camera_faults.FAULTS,
    *depth_faults.FAULTS,
    *pair_faults.FAULTS,
    *request_faults.FAULTS,
    *reasoner_faults.FAULTS,
    *process_faults.FAULTS,
)
