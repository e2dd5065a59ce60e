"""Schemas of the composed configuration, registered with Hydra's ConfigStore.

A file of a group starts with its schema (`defaults: [topk_schema, _self_]`), so a misspelt key or
a value of the wrong type fails while the configuration is composed. `ROUTER_KINDS` is the closed
table by which a stored configuration finds its classes: no class is named in a file.
"""

from hydra.core.config_store import ConfigStore

from gatewise.routers.config import RouterConfig
from gatewise.training.config import TrainConfig

__all__ = ["GROUPS", "ROUTER_KINDS", "register"]

# Groups of conf/train.yaml that the command line chooses from, and whether they may be null.
GROUPS = {"experiment": True, "router": False}

ROUTER_KINDS: dict[str, type[RouterConfig]] = {"topk": RouterConfig}


def register() -> None:
    """Put the schemas into Hydra's ConfigStore; calling it again changes nothing."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    for kind, schema in ROUTER_KINDS.items():
        store.store(group="router", name=f"{kind}_schema", node=schema)
