"""What has gone wrong in real kernels, as changes of the simulated ones, one at a time.

The table is read twice: `docs/gpu-faults.md` says which GPU test catches which fault, and a test
that fails on a real GPU names the faults that explain what it saw.
"""

from __future__ import annotations

from collections.abc import Mapping

from pytest_moe_routing.simulator.expert_faults import EXPERT_FAULTS
from pytest_moe_routing.simulator.routing_faults import ROUTING_FAULTS
from pytest_moe_routing.simulator.stages import Fault

FAULTS: Mapping[str, Fault] = {fault.name: fault for fault in (*ROUTING_FAULTS, *EXPERT_FAULTS)}
