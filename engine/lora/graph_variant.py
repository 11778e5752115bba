"""Which launches for adapters a captured step has: the one thing that is not data of a replay."""

from enum import Enum, auto


class GraphVariant(Enum):
    """Which batches it computes, and where their adapters' part is computed.

    | variant    | batches                       | the adapters' part                              |
    |------------|-------------------------------|-------------------------------------------------|
    | `BASE`     | base rows alone               | nowhere                                         |
    | `BESIDE`   | of adapters that only add     | wherever is fastest, also beside the product    |
    | `IN_PLACE` | of any adapters               | behind the product, which it changes            |

    A row scale applies to the product as well, so it has to be there.
    """

    BASE = auto()
    BESIDE = auto()
    IN_PLACE = auto()
