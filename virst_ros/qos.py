# SPDX-License-Identifier: Apache-2.0
"""Quality of service of each endpoint, and the reason.

Images come in best effort: that matches every publisher, reliable or not, and a late image is worth nothing (REP-2003).
Results go out reliable: that matches every subscriber, also those that insist on reliability.
"""

from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSProfile,
    ReliabilityPolicy,
    qos_profile_sensor_data,
    qos_profile_system_default,
)

PROFILES = {
    "DEFAULT": QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=10,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.VOLATILE,
    ),
    "SENSOR_DATA": qos_profile_sensor_data,
    "SYSTEM_DEFAULT": qos_profile_system_default,
}

# A picture for people: nobody should be slowed down by a viewer behind a slow network.
OVERLAY = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
)

# Large, and old ones are worth nothing.
NEWEST = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)

# The state of the newest frame, also for those who join later.
LATCHED = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)


def profile(name: str, depth: int) -> QoSProfile:
    """The profile of `PROFILES` called `name`, keeping the last `depth` messages."""
    base = PROFILES[name]
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=base.reliability,
        durability=base.durability,
    )
