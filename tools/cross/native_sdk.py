"""Make the native SDK: `python native_sdk.py OUT` (called by `make native-sdk`). Needs network for PyPI's zig, CMake and ninja.

A folder for each target with the headers, libedgeml as a static and a shared library, and the example in C: Linux on aarch64 and
x86-64, by zig as the wheels are; and Android (arm64-v8a) where ANDROID_NDK_HOME names an NDK, because Android's C library comes
only with it. Apple's systems compile the sources in native/ with their own tools: docs/phones.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from wheels import GLIBC, ROOT, run, tools, zig_programs

LINUX = ("aarch64", "x86_64")
ANDROID_ABI, ANDROID_PLATFORM = "arm64-v8a", "android-24"  # 64-bit Android 7: what onnxruntime's own archive asks for


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "dist" / "native-sdk", help="folder for the SDK")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheels", help="folder for tools and objects")
    args = parser.parse_args()
    ndk = os.environ.get("ANDROID_NDK_HOME")
    file = Path(ndk or "", "build", "cmake", "android.toolchain.cmake")
    if ndk and not file.is_file():
        print(f"edgeml: ANDROID_NDK_HOME is {ndk}, which holds no NDK: it lacks {file.relative_to(ndk)}", file=sys.stderr)
        return 2
    work = args.work.resolve()
    python = tools(work)
    for machine in LINUX:
        toolchain = {
            "CMAKE_TOOLCHAIN_FILE": Path(__file__).with_name("zig.cmake"),
            "EDGEML_TARGET": f"{machine}-linux-gnu.{GLIBC}",
            "EDGEML_ZIG": zig_programs(python, work),
        }
        build(python, work / f"sdk-{machine}", args.out.resolve() / f"{machine}-linux", toolchain)
    if ndk:
        android = {"CMAKE_TOOLCHAIN_FILE": file, "ANDROID_ABI": ANDROID_ABI, "ANDROID_PLATFORM": ANDROID_PLATFORM}
        android["ANDROID_SUPPORT_FLEXIBLE_PAGE_SIZES"] = "ON"  # memory pages of 16 KiB too
        build(python, work / "sdk-android", args.out.resolve() / f"{ANDROID_ABI}-android", android)
    else:
        print("edgeml: nothing made for Android: no NDK is here; name its folder with ANDROID_NDK_HOME", file=sys.stderr)
    return 0


def build(python: Path, objects: Path, out: Path, toolchain: dict[str, str | Path]) -> None:
    """Configure, compile and install one target."""
    print(f"edgeml: making {out.name} ...", file=sys.stderr)
    cache = {"ZIG_GLOBAL_CACHE_DIR": str(objects.parent / "zig-cache"), "ZIG_LOCAL_CACHE_DIR": str(objects.parent / "zig-cache")}
    defines = {"CMAKE_MAKE_PROGRAM": python.with_name("ninja"), "EDGEML_SDK": "ON", "CMAKE_INSTALL_PREFIX": out, **toolchain}
    cmake = python.with_name("cmake")
    options = [f"-D{name}={value}" for name, value in defines.items()]
    run(cmake, "-G", "Ninja", "-S", ROOT, "-B", objects, *options, environment=cache, quiet=True)
    run(cmake, "--build", objects, "--", "--quiet", environment=cache)
    shutil.rmtree(out, ignore_errors=True)
    run(cmake, "--install", objects, "--prefix", out, environment={**cache, "CMAKE_INSTALL_MODE": "COPY"}, quiet=True)
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        file.touch()  # made now, however old its objects are
        print(f"{file}  {file.stat().st_size} bytes")


if __name__ == "__main__":
    sys.exit(main())
