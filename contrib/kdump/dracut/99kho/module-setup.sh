#!/bin/bash
# A dracut module for the initramfs of kdump-utils (Fedora, RHEL): kho, the Python that it is installed in, and kho-save as a
# script of /etc/kdump/pre.d, which kdump runs before the core collector. Install the directory as
# /usr/lib/dracut/modules.d/99kho, add "dracut_args --add kho" to /etc/kdump.conf, and run kdumpctl rebuild.

# Prints the path of kho, or of the one that KHO names. dracut leaves nothing but the directories of the system in PATH.
kho_path() (
    PATH=$PATH:/usr/local/sbin:/usr/local/bin
    command -v "${KHO:-kho}"
)

# Only where it is asked for, and where kho is installed.
check() {
    kho_path >/dev/null || return 1
    return 255
}

depends() {
    echo kdumpbase
}

# Prints the files that kho needs, one a line: the interpreter of its first line, the modules of its standard library that a
# run of kho loads, kho itself and the packages it imports.
kho_files() {
    local kho python
    kho=$(kho_path) || return 1
    python=$(sed -n '1s/^#! *//p' "$kho")
    echo "$kho"
    echo "$python"
    "$python" - <<'PYTHON'
import glob
import os
import site
import sys
import sysconfig

paths = sysconfig.get_paths()
skip = {"test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "__pycache__", "site-packages", "dist-packages"}


def walk(top):
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in skip)
        for name in sorted(files):
            if name.endswith((".py", ".so", ".pth")):
                print(os.path.join(folder, name))


for top in dict.fromkeys((paths["stdlib"], paths["platstdlib"])):
    walk(top)
import kho.cli  # noqa: E402 - what the command needs is what it loads

for name in sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)):
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or not os.path.isabs(file):
        continue
    if os.path.basename(file).startswith("__init__."):
        walk(os.path.dirname(file))
    else:
        print(file)
for name in ("rich", "click"):
    try:
        walk(os.path.dirname(__import__(name).__file__))
    except ImportError:
        pass
# An editable install is a file that names the directory of the sources; other such files run code of other packages.
paths = []
for folder in site.getsitepackages():
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.pth"))):
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            if all(os.path.isdir(line.rstrip("\n")) for line in lines):
                paths.append(path)
for file in (os.path.join(sys.prefix, "pyvenv.cfg"), os.path.realpath(sys.executable), *paths):
    if os.path.exists(file):
        print(file)
PYTHON
}

# shellcheck disable=SC2154 # moddir is dracut's
install() {
    local file
    while read -r file; do
        inst "$file"
    done < <(kho_files)
    inst_multiple timeout df awk tail date chmod mkdir mv rm sync
    inst_script "$moddir/kho-save" /etc/kdump/pre.d/kho-save
    inst_multiple -o /etc/kho-save.conf
}
