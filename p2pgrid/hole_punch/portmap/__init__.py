"""Have the gateway let others reach a port of ours: PCP, NAT-PMP or UPnP, whichever it speaks."""

from p2pgrid.hole_punch.portmap.mapper import WAYS
from p2pgrid.hole_punch.portmap.story import Mapping, open_mapping

__all__ = ["WAYS", "Mapping", "open_mapping"]
