"""Benchmarks and proofs of the kernels, and the commands behind the published studies."""

import bench.common.checkout  # noqa: F401 - before what needs the checkout on the path
