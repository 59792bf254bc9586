"""How handlers reach what the process owns: typed aliases, and no other way."""

from typing import Annotated

from fastapi import Query

from hostler_common import http
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.efficiency import Efficiency
from hostler_precache.distribution.looks import Looks
from hostler_precache.distribution.policy_store import PolicyStore
from hostler_precache.settings import Settings
from hostler_precache.store import Store
from hostler_precache.swarming.desires import Desires
from hostler_precache.swarming.growths import Growths
from hostler_precache.swarming.swarm_store import SwarmStore
from hostler_precache.swarming.tracker import Tracker

StoreDep = Annotated[Store, http.state("store")]
DistributionsDep = Annotated[DistributionStore, http.state("distributions")]
EfficiencyDep = Annotated[Efficiency, http.state("efficiency")]
LooksDep = Annotated[Looks, http.state("looks")]
SwarmsDep = Annotated[SwarmStore, http.state("swarms")]
PoliciesDep = Annotated[PolicyStore, http.state("policies")]
DesiresDep = Annotated[Desires, http.state("desires")]
GrowthsDep = Annotated[Growths, http.state("growths")]
TrackerDep = Annotated[Tracker, http.state("tracker")]
SettingsDep = Annotated[Settings, http.state("settings")]
Limit = Annotated[int, Query(ge=1, le=1000)]
