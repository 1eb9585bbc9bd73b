# SPDX-License-Identifier: Apache-2.0
from virst_ros.demo.command import main

main()
