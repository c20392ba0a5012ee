"""The reading side of the mooncake_store store."""

from __future__ import annotations

import logging
import re
import time

from specforge_ext.config import parse_json
from specforge_ext.copies import copied
from specforge_ext.records import SampleRef
from specforge_ext.store import device_memory, direct_gpu, mooncake, payload
from specforge_ext.store import mooncake_objects as objects
from specforge_ext.store.base import (
    Capabilities,
    CorruptFeature,
    ProducerLost,
    StaleRef,
    StoreError,
)

log = logging.getLogger(__name__)


class MooncakeStoreReader:
    """Any thread may open and acknowledge."""

    def __init__(self, address: str) -> None:
        match = re.fullmatch(r"mooncake_store:([0-9a-f]{16}):(\{.*\})", address)
        if match is None:
            raise ValueError(
                f"mooncake_store: address must be mooncake_store:EPOCH:JSON, got {address[:96]!r}"
            )
        self._epoch = match[1]
        self._store = f"mooncake_store:{self._epoch}"
        self._address = parse_json(objects.Address, match[2], where="address")
        mooncake.expect_protocol(self._address.protocol, self._address.devices)
        self._gpu = direct_gpu.gpu_for(
            self._address.direct, self._address.protocol, None, what=self._store
        )
        package = mooncake.module("mooncake.store")
        master = self._address.master
        if not mooncake.is_reachable(master, timeout_s=objects.MASTER_S):
            raise ProducerLost(f"{self._store}: its master at {master} has ended")
        self._client = objects.connect(
            package,
            mooncake.local_host(master.rpartition(":")[0]),
            master,
            protocol=self._address.protocol,
            devices=self._address.devices,
            segment_bytes=0,
        )
        self._pool: mooncake.Pool[mooncake.Room] | None = mooncake.Pool(
            self._address.pool_bytes,
            self._client.register_buffer,
            device=None if self._gpu is None else self._gpu.index,
        )
        if not self.producer_alive:
            self.close()
            raise ProducerLost(f"{self._store}: its producer has ended")
        if self._gpu is not None:
            self._expect_alive_bytes()

    @property
    def producer_alive(self) -> bool:
        """Asks by reading; takes about a second when it is not."""
        pool = self._open_pool()
        slot = pool.acquire(objects.ALIVE_BYTES, self._address.read_timeout_s)
        code = self._get_once(objects.alive_key(self._epoch), slot, objects.ALIVE_BYTES)
        objects.leave(pool, slot, code)
        return code == objects.ALIVE_BYTES

    def open(self, ref: SampleRef, *, layout_hash: str, verify: bool) -> payload.SampleLease:
        """Copy a sample into the pool, in one call, and lease that.

        verify: compare the checksums. ValueError for an impossible ref; LayoutMismatch, StaleRef,
        CorruptFeature; ProducerLost with the producer's segment; TransferTimeout if leases leave no
        room in the pool; StoreError after three attempts that Mooncake failed.
        """
        payload.expect_ref(ref, store=self._store)
        payload.expect_layout(ref, layout_hash)
        pool = self._open_pool()
        for attempt in range(objects.ATTEMPTS):
            slot = pool.acquire(ref.nbytes, self._address.read_timeout_s)
            code = self._get_once(
                objects.key_of(self._epoch, ref.generation), slot, objects.size_of(ref)
            )
            if code == objects.size_of(ref):
                copied("transfer", payload.feature_bytes(ref))
                self._arrived()
                with device_memory.own_stream(pool.device):
                    return payload.lease(pool.lease(slot), ref, verify=verify)
            objects.leave(pool, slot, code)
            if code not in objects.TRANSIENT or not self.producer_alive:
                break
            log.warning("read of %s failed: error %d, attempt %d", ref.sample_id, code, attempt + 1)
            time.sleep(objects.RETRY_PAUSE_S)
        raise self._explain(ref, code)

    def ack(self, ref: SampleRef) -> None:
        """Remove the object; leases keep their bytes. Again is nothing, for a repeated request to
        the master must be. ProducerLost when the master is gone."""
        self._open_pool()
        payload.expect_ref(ref, store=self._store)
        objects.remove(self._client, objects.key_of(self._epoch, ref.generation))

    def capabilities(self) -> Capabilities:
        on_gpu = self._gpu is not None
        return mooncake.capabilities_over("mooncake_store", self._address.protocol, on_gpu=on_gpu)

    def close(self) -> None:
        """Leases keep their bytes."""
        if self._pool is not None:
            self._client.close()
            self._pool = None

    def _open_pool(self) -> mooncake.Pool[mooncake.Room]:
        if self._pool is None:
            raise StoreError("mooncake_store reader: wanted an open pool, but it was closed")
        return self._pool

    def _arrived(self) -> None:
        if self._gpu is not None:
            direct_gpu.arrived(self._gpu, self._address.protocol)

    def _expect_alive_bytes(self) -> None:
        """StoreError unless a read brings an object's bytes to where samples are read."""
        pool = self._open_pool()
        slot = pool.acquire(objects.ALIVE_BYTES, self._address.read_timeout_s)
        code = self._get_once(objects.alive_key(self._epoch), slot, objects.ALIVE_BYTES)
        if code != objects.ALIVE_BYTES:
            objects.leave(pool, slot, code)
            raise ProducerLost(f"{self._store}: its producer has ended (error {code})")
        self._arrived()
        came = pool.content(slot)
        slot.abort()
        if came.hex() != self._address.alive_bytes:
            self.close()
            raise mooncake.other_bytes(self._store, self._address.protocol)

    def _get_once(self, key: str, slot: mooncake.Room, size: int) -> int:
        """Bytes of the object, or an error."""
        [code] = self._client.batch_get_into([key], [slot.address], [size])
        return int(code)

    def _explain(self, ref: SampleRef, code: int) -> StoreError:
        """What a read that gave `code` means."""
        name = f"sample {ref.sample_id!r}"
        if code >= 0 or code == objects.TOO_SMALL:
            size = (
                code
                if code >= 0
                else self._client.get_size(objects.key_of(self._epoch, ref.generation))
            )
            return CorruptFeature(f"{name}: wanted {ref.nbytes} bytes, the store holds {size}")
        if not self.producer_alive:
            return ProducerLost(f"{name}: the producer of {self._store} has ended (error {code})")
        if code == objects.NOT_FOUND:
            return StaleRef(f"{name}: generation {ref.generation} was acknowledged already")
        return StoreError(f"{name}: Mooncake could not read {ref.nbytes} bytes: error {code}")
