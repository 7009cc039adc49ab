"""What layouts need and take at first sight, with everything worked out once that many of them share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache

from tptrain.config import Config
from tptrain.pipeline.actions import Schedule, placement
from tptrain.pipeline.schedules import SCHEDULES
from tptrain.plan.bound import least_seconds
from tptrain.plan.layouts import Layout, Layouts
from tptrain.plan.links import collective_seconds, group_links
from tptrain.plan.communication import message_bytes
from tptrain.plan.pipeline import PipelinePlan, costs_for_schedule, plan_of, stage_layers
from tptrain.plan.stage_time import StageTime, stage_times
