"""Build the C++ extension: one object per ISA tier with its own flags (clang where it is found), the rest by the default compiler."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
TIERS = {  # tier file in csrc/tiers -> instruction set flags
    "avx2": AVX2,
    "avx_vnni": [*AVX2, "-mavxvnni"],
    "avx512_vnni": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
# Tier objects keep every symbol but their table local, so that no inline function compiled for a larger CPU is shared.
TIER_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-unknown-warning-option",
    "-Wno-maybe-uninitialized",  # gcc 12: false alarms in its own intrinsics headers
]


def tier_compiler() -> str:
    """Return clang++ of version 16 or newer, else g++ (gcc 12 spills vector accumulators; its objects are slower, not wrong)."""
    named = os.environ.get("LLMRT_TIER_CXX")
    candidates = [named] if named else [*(f"clang++-{v}" for v in range(24, 15, -1)), "clang++"]
    for candidate in candidates:
        if path := shutil.which(candidate):
            version = re.search(
                r"version (\d+)", subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            )
            if named or (version and int(version[1]) >= 16):
                return path
    if named:
        raise SystemExit(f"LLMRT_TIER_CXX={named}: no such compiler")
    return os.environ.get("CXX", "g++")


class BuildTiers(BuildExtension):
    """Compile csrc/tiers/*.cpp, then link them into the extension."""

    def build_extensions(self) -> None:
        """Build the tier objects in parallel and add them to the extension's objects."""
        compiler, objects = tier_compiler(), []
        print(f"llmrt: tier files compiled by {compiler}", flush=True)
        os.makedirs(self.build_temp, exist_ok=True)
        newest_header = max(os.path.getmtime(f) for f in [*glob("csrc/*.h"), "setup.py"])

        def compile_tier(item: tuple[str, list[str]]) -> str:
            name, flags = item
            source, target = f"csrc/tiers/{name}.cpp", os.path.join(self.build_temp, f"tier_{name}.o")
            newest = max(newest_header, os.path.getmtime(source))
            if not os.path.exists(target) or os.path.getmtime(target) < newest:
                subprocess.run([compiler, *TIER_FLAGS, *flags, "-Icsrc", "-c", source, "-o", target], check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_tier, TIERS.items()))
        for extension in self.extensions:
            extension.extra_objects = objects
        super().build_extensions()


if __name__ == "__main__":  # tests read the tables above
    setup(
        ext_modules=[
            CppExtension(
                "llmrt._C",
                sorted(glob("csrc/*.cpp")),
                depends=glob("csrc/*.h"),
                include_dirs=[os.path.abspath("csrc")],
                py_limited_api=True,
                extra_compile_args=[
                    "-std=c++20",
                    "-O3",
                    "-fopenmp",
                    "-g0",
                    "-fvisibility=hidden",
                    "-Wall",
                    "-Wno-unknown-pragmas",
                    "-Wno-maybe-uninitialized",
                    "-DTORCH_TARGET_VERSION=0x020d000000000000",
                ],
                extra_link_args=["-fopenmp"],
            )
        ],
        cmdclass={"build_ext": BuildTiers},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
