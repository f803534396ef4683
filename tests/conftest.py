"""Settings and small models shared by all tests."""

from importlib import metadata
import os
import signal
import threading

# Programs of tests are interrupted, also where the tests run in the background of a shell, which
# ignores Ctrl-C.
if threading.current_thread() is threading.main_thread():
  signal.signal(signal.SIGINT, signal.default_int_handler)

# Before JAX is imported: eight devices on the host, for the tests of sharding,
# and little effort of LLVM, as nearly all of the tests' time is compiling.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = {"xla_force_host_platform_device_count": 8, "xla_backend_optimization_level": 0}
# The older of two ways to make code of fusions, which jaxlib 0.10 is the last to have (others
# end at a flag that they do not know), compiles in half of the time.
if metadata.version("jaxlib").startswith("0.10."):
  _FLAGS["xla_cpu_use_fusion_emitters"] = "false"
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
  [_given, *(f"--{name}={value}" for name, value in _FLAGS.items() if name not in _given)]
)

import hf
import jax
import pytest
import tiny

# The modules that take longest, in this order.
LONGEST = (
  "test_roster",
  "test_score",
  "test_distributed",
  "test_window",
  "test_tune",
  "test_notebooks",
  "test_sharding",
  "test_restoring",
  "test_train",
  "test_compare",
  "test_figures",
  "test_documents",
  "test_sandbox",
  "test_parity",
  "test_trials",
  "test_accelerator_experts",
  "test_bit_plans",
  "test_generate",
  "test_slots",
  "test_attention",
  "test_drafting",
  "test_merging",
  "test_costs",
  "test_evaluate",
)

# Set once for all tests: they are part of what a compiled function is cached by.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


def pytest_configure(config):
  """Keeps compiled programs between tests, the programs they start, and runs."""
  if getattr(config, "cache", None) is not None:
    folder = str(config.cache.mkdir("jax"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # For programs in processes of their own, which often run one after the other.
    os.environ["ROE_JAX_CACHE"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_collection_modifyitems(items):
  """Starts the longest modules first, so that no worker ends long after the others."""
  position = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: position.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
  """Frees the compiled programs of each module: a process may map only so many."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def olmoe():
  """Config and parameters: gates not normalized, norms on queries and keys."""
  config = tiny.config("olmoe")
  return config, tiny.params(config)


@pytest.fixture(scope="session")
def mixtral():
  """Config and parameters: normalized gates, no norms on queries and keys."""
  config = tiny.config("mixtral")
  return config, tiny.params(config)


@pytest.fixture(scope="session", params=hf.ROUTED)
def model(request):
  """Config and parameters of all families with routers in turn."""
  if request.param in ("olmoe", "mixtral"):
    return request.getfixturevalue(request.param)
  config = tiny.config(request.param)
  return config, tiny.params(config)
