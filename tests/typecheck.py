"""The checker behind pytest's --jaxtyping-packages: beartype, with one hint that it does not know."""

from typing import Any

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype

# beartype wants np.dtype[...] as the second argument; pyright is content with Any.
check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({np.ndarray[Any, Any]: np.ndarray})))
