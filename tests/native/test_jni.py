"""The native side of an Android app, under a real Java virtual machine that checks every call (-Xcheck:jni)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeml.bundle import Bundle
from edgeml.made import make_cnn, make_mixture
from edgeml.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[2]
SDK = ROOT / "dist" / "native-sdk" / f"{platform.machine()}-linux"
JAVA = """
package org.example;
import java.io.*;

public class Edgeml {
  static { System.loadLibrary("edgeml"); System.loadLibrary("edgeml_jni"); }
  static native long open(int fd) throws IOException;
  static native byte[] bytes(long host, int page) throws IOException;
  static native String start(long host, int[] sites, int count, long budget, int threads) throws IOException;
  static native void begin(long host) throws IOException;
  static native double end(long host);
  static native void evictAll(long host);
  static native void close(long host) throws IOException;

  interface Call { Object now() throws Exception; }

  static void say(Call call) throws Exception {
    try { System.out.println(call.now()); } catch (IOException error) { System.out.println("refused: " + error.getMessage()); }
  }

  static long opened(String path) throws Exception {
    var field = FileDescriptor.class.getDeclaredField("fd");
    field.setAccessible(true);
    try (var file = new FileInputStream(path)) { return open(field.getInt(file.getFD())); }
  }

  public static void main(String[] given) throws Exception {
    say(() -> opened(given[1]));
    long host = opened(given[0]);
    int[] sites = new int[given.length - 4];
    for (int i = 0; i < sites.length; i++) sites[i] = Integer.parseInt(given[i + 4]);
    say(() -> new String(bytes(host, -1), "UTF-8").length());
    say(() -> bytes(host, Integer.parseInt(given[2])).length);
    say(() -> bytes(host, 1 << 20));
    say(() -> start(host, new int[] {1, 1, 1, 0, 99999, 0}, 1, 1 << 20, 1));
    say(() -> start(host, sites, Integer.parseInt(given[3]), 1, 2).length() > 0);
    begin(host);
    say(() -> { begin(host); return "twice"; });
    say(() -> end(host));
    evictAll(host);
    close(host);
    System.out.println("closed");
  }
}
"""


@pytest.mark.parametrize("make", [make_mixture, make_cnn])
def test_an_app_opens_reads_and_closes(make: Callable[[Path], object], tmp_path: Path) -> None:
    javac, compiler = shutil.which("javac"), shutil.which("cc")
    if javac is None or compiler is None or not (SDK / "lib" / "libedgeml.so").exists():
        pytest.skip("needs a JDK, a C compiler and `make native-sdk`")
    jdk = Path(javac).resolve().parents[1]
    includes = [f"-I{jdk}/include", f"-I{jdk}/include/linux", f"-I{SDK}/include"]
    source, library = ROOT / "examples" / "android" / "edgeml_jni.c", tmp_path / "libedgeml_jni.so"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, *includes, source, f"-L{SDK}/lib", "-ledgeml", "-o", library], check=True)
    (tmp_path / "Edgeml.java").write_text(JAVA)
    subprocess.run([javac, "-d", tmp_path, tmp_path / "Edgeml.java"], check=True, capture_output=True)
    path = tmp_path / "toy.edgeml"
    make(path)
    with Bundle.open(path) as bundle:
        manifest, graph = load_manifest(bundle), bundle.pages[load_manifest(bundle).stages[0].page]
        manifest_bytes = bundle.header.manifest_length
    sites = []
    for site in manifest.sites:
        sites += [site.hidden, site.top_k, len(site.experts), len(site.shared)]
        sites += [number for ref in (*site.experts, *site.shared) for number in (ref.page, ref.sub)]
    java = [jdk / "bin" / "java", "-Xcheck:jni", "--add-opens", "java.base/java.io=ALL-UNNAMED", "-cp", tmp_path]
    java += [f"-Djava.library.path={tmp_path}:{SDK}/lib", "org.example.Edgeml", path, source, manifest.stages[0].page]
    java += [len(manifest.sites), *sites]
    environment = os.environ | {"LD_LIBRARY_PATH": f"{SDK}/lib"}
    done = subprocess.run([*map(str, java)], capture_output=True, text=True, check=True, env=environment)
    assert "WARNING" not in done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "refused: this is not an edgeml bundle (the first 8 bytes are not the format's)",
        str(manifest_bytes),
        str(graph.length),
        "refused: there is no such page",
        "refused: an argument is outside its range",
        "true",
        "refused: this thread has a request already",
        "0.0",
        "closed",
    ]
