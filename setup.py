"""One distribution, three import packages; the folders that hold two of them are not packages themselves."""

from setuptools import find_packages, setup

ROOTS = {"fedmoe_core": ".", "fedmoe_kernels": "kernels", "fedmoe_bindings": "bindings"}

setup(
    packages=[name for root, folder in ROOTS.items() for name in find_packages(folder, include=[root, f"{root}.*"])],
    package_dir={root: f"{folder}/{root}" for root, folder in ROOTS.items()},
    package_data={
        "fedmoe_kernels": ["py.typed", "tiles/*.json"],
        "fedmoe_core": ["py.typed", "exporting/*.j2", "reporting/*.jinja", "reporting/*.css"],
        "fedmoe_bindings": ["py.typed"],
    },
)
