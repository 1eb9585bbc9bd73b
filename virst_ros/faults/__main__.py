# SPDX-License-Identifier: Apache-2.0
from virst_ros.faults.command import main

main()
