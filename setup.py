"""One distribution, three import packages; the folders that hold two of them are not packages themselves."""

from setuptools import setup

setup(
    packages=["fedmoe_core", "fedmoe_core.algorithms", "fedmoe_kernels", "fedmoe_kernels.gpu", "fedmoe_bindings"],
    package_dir={
        "fedmoe_core": "fedmoe_core",
        "fedmoe_kernels": "kernels/fedmoe_kernels",
        "fedmoe_bindings": "bindings/fedmoe_bindings",
    },
    package_data={"fedmoe_kernels": ["tiles/*.json"]},
)
