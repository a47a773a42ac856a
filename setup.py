"""Mount the top-level `conf/` and `kernels/` as `codetr.conf` and `codetr.kernels.*`; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

kernels = find_packages("kernels")
setup(
    package_dir={
        "codetr": "src/codetr",
        "codetr.conf": "conf",
        **{f"codetr.kernels.{name}": f"kernels/{name}" for name in kernels if "." not in name},
    },
    packages=[*find_packages("src"), "codetr.conf", *(f"codetr.kernels.{name}" for name in kernels)],
)
