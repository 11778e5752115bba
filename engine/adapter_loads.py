"""The loads in flight, and what past ones say of when these will be done."""

from engine.adapter_slots import AdapterState, PooledAdapter
from engine.load_forecast import Arrival, LoadForecast
from ipc.errors import Internal
from ipc.messages import LoadId


class AdapterLoads:
    """Adapters that are LOADING or CANCELLING, in the order in which their loads began."""

    def __init__(self) -> None:
        self._loads: dict[LoadId, PooledAdapter] = {}
        self._next_load_id = 1
        self._forecast = LoadForecast()

    def __len__(self) -> int:
        return len(self._loads)

    @property
    def last(self) -> LoadId | None:
        """The one that began last, which may be over; None before the first."""
        return LoadId(self._next_load_id - 1) if self._next_load_id > 1 else None

    def in_flight(self) -> list[PooledAdapter]:
        """Those that are LOADING, the earliest first."""
        return [load for load in self._loads.values() if load.state is AdapterState.LOADING]

    def find(self, load_id: LoadId) -> PooledAdapter | None:
        """The adapter whose load it is, if nobody has given it up."""
        adapter = self._loads.get(load_id)
        return adapter if adapter is not None and adapter.state is AdapterState.LOADING else None

    def arrivals(self, now_s: float) -> list[Arrival]:
        """When those that are LOADING are expected to be RESIDENT, in their order.

        Empty as long as no load has shown how long one takes.
        """
        loads = ((a.adapter_id, a.layout.num_bytes, a.load_began_s) for a in self.in_flight())
        return list(self._forecast.arrivals(loads, now_s))

    def begin(self, adapter: PooledAdapter, now_s: float) -> LoadId:
        """The adapter, ABSENT but with a slot, is LOADING."""
        load_id = LoadId(self._next_load_id)
        self._next_load_id += 1
        adapter.state = AdapterState.LOADING
        adapter.load_id = load_id
        adapter.load_began_s = now_s
        self._loads[load_id] = adapter
        return load_id

    def complete(self, load_id: LoadId, now_s: float) -> None:
        """Its last byte is in the slot: the adapter, which is LOADING, is RESIDENT."""
        adapter = self._loads.pop(load_id)
        adapter.state = AdapterState.RESIDENT
        adapter.load_id = None
        adapter.num_lost_loaders = 0
        self._forecast.placed(adapter.layout.num_bytes, adapter.load_began_s, now_s)

    def cancel(self, adapter: PooledAdapter) -> LoadId:
        """The adapter, which is LOADING, is CANCELLING until ``remove``."""
        assert adapter.load_id is not None, "only a load in flight is abandoned"
        adapter.state = AdapterState.CANCELLING
        return adapter.load_id

    def remove(self, load_id: LoadId) -> PooledAdapter:
        """Nothing writes into the slot of the adapter any more, which was CANCELLING.

        Raises:
            Internal: the load is not one that is being cancelled.
        """
        adapter = self._loads.get(load_id)
        if adapter is None or adapter.state is not AdapterState.CANCELLING:
            raise Internal(f"load {load_id} was abandoned, but it is not being cancelled")
        del self._loads[load_id]
        adapter.load_id = None
        return adapter
