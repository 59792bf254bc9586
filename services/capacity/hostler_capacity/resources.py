"""Resource classes: the names of what a node has and a claim takes.

Every quantity in this service is an integer in the unit its class names, and a vector of them is
a mapping from class to amount. The classes are open (`NewType`, not an enum): memory, vCPUs, disk
space and disk I/O are claimed by the same SQL, and so will be a class an operator invents.
"""

from collections.abc import Mapping
from typing import Final, NewType

ResourceClass = NewType("ResourceClass", str)
Vector = Mapping[ResourceClass, int]

MEMORY_MB: Final = ResourceClass("memory_mb")
VCPUS: Final = ResourceClass("vcpus")
DISK_GB: Final = ResourceClass("disk_gb")
DISK_IOPS: Final = ResourceClass("disk_iops")
DISK_BPS: Final = ResourceClass("disk_bps")

STANDARD: Final = (MEMORY_MB, VCPUS, DISK_GB, DISK_IOPS, DISK_BPS)
