"""Stores. A new one is a file and a line here."""

from specforge_ext.registry import Registry

STORES = Registry("store")
STORES.add("shm", "specforge_ext.store.shm:ShmStore")
STORES.add("shared_dir", "specforge_ext.store.shared_dir:SharedDirStore")
STORES.add("mooncake_store", "specforge_ext.store.mooncake_store:MooncakeStore")
STORES.add("mooncake_p2p", "specforge_ext.store.mooncake_p2p:MooncakeP2PStore")
STORES.add("cuda_ipc", "specforge_ext.store.cuda_ipc:CudaIpcStore")

__all__ = ["STORES"]
