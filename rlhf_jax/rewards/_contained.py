"""The inner side of the sandbox: `python -I -S _contained.py LIMITS FOLDER COMMAND…` gives up what it can, then becomes COMMAND.

A script of the standard library alone, not a module of the package: it must start within milliseconds, and from a process without threads. LIMITS
is JSON. Each fence is put up where the system offers it; with `"report": true` the fences that stand are printed instead of running COMMAND. Three
processes: this one, which enters new namespaces; the first of the new process namespace, whose end ends all the others; and the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

NEW_USER, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
NO_NEW_PRIVILEGES, DEATH_SIGNAL, KEEP_CAPABILITIES, AMBIENT = 38, 1, 8, 47
READ_ANY = 2  # CAP_DAC_READ_SEARCH: root's interpreter may lie where only root reads
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, the same on all architectures
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1, 2, 4, 8, 1 << 14
BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}  # rights on files that each version knows; (1 << 16) − 1 from 5 on
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random")

libc = ctypes.CDLL(None, use_errno=True)


def must(result: int) -> int:
    """The result of a C call, or OSError."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def namespaces() -> list[str]:
    """No network, and process ids of its own, as root or through a user namespace."""
    user, group = os.getuid(), os.getgid()
    try:
        must(libc.unshare(NEW_PIDS | NEW_NETWORK))
    except OSError:
        try:
            must(libc.unshare(NEW_USER | NEW_PIDS | NEW_NETWORK))
            for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(content)
        except OSError:
            return []
    return ["network", "processes"]


def other_user(user: int) -> list[str]:
    """Root becomes a user of its own, who owns nothing and counts for himself in the limit on processes."""
    if os.getuid() != 0:
        return []
    try:
        must(libc.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0))
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        sets = (ctypes.c_uint32 * 6)(*([1 << READ_ANY] * 3), 0, 0, 0)
        must(libc.capset(header, sets))
        must(libc.prctl(AMBIENT, 2, READ_ANY, 0, 0))
    except OSError:
        if os.getuid() == 0:
            return []
    return ["user"]


def landlock(folder: str, python: list[str]) -> list[str]:
    """Reads only the interpreter's folders and the system's libraries, writes only `folder`; no TCP, and no signals to others, where the kernel knows
    how."""
    try:
        version = must(libc.syscall(CREATE_RULESET, None, 0, 1))
        rights = BY_ABI.get(version, (1 << 16) - 1)
        attributes = (ctypes.c_uint64 * 3)(rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
        size = 24 if version >= 6 else 16 if version >= 4 else 8
        rules = must(libc.syscall(CREATE_RULESET, attributes, size, 0))
        readable = EXECUTE | READ_FILE | READ_DIR
        for path, allowed in [*((path, readable) for path in (*python, *SYSTEM)), ("/dev/null", READ_FILE | WRITE_FILE), (folder, rights)]:
            if not os.path.isdir(path):
                allowed &= EXECUTE | READ_FILE | WRITE_FILE | TRUNCATE
            with contextlib.suppress(FileNotFoundError):
                opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
                rule = ctypes.create_string_buffer(allowed.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder), 12)
                must(libc.syscall(ADD_RULE, rules, 1, rule, 0))
                os.close(opened)
        must(libc.syscall(RESTRICT_SELF, rules, 0))
        os.close(rules)
    except OSError:
        return []
    return ["files"]


def limit(limits: dict[str, Any]) -> None:
    """Resource limits, hard ones."""
    wanted = {
        resource.RLIMIT_CPU: limits["cpu"], resource.RLIMIT_AS: limits["memory"], resource.RLIMIT_FSIZE: limits["file"],
        resource.RLIMIT_NPROC: limits["processes"], resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        with contextlib.suppress(ValueError, OSError):  # a lower one is in force already
            resource.setrlimit(kind, (value, value))


def wait_for(child: int) -> int:
    """The exit status of `child`; other ended processes are cleared away meanwhile."""
    while True:
        ended, status = os.wait()
        if ended == child:
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def with_parent() -> None:
    """Dies with its parent; a change of user would take this back."""
    with contextlib.suppress(AttributeError):
        libc.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    """Puts up the fences, one process further in each time."""
    limits, folder, command = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
    linux = sys.platform == "linux"
    user = 1_000_000_000 + os.getpid()  # another one for each run
    standing = namespaces() if linux else []
    if first := os.fork():
        sys.exit(wait_for(first))
    with_parent()
    if program := os.fork():
        status = wait_for(program)
        os._exit(status)
    if linux:
        standing += other_user(user)
        with_parent()
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        standing += landlock(folder, limits["python"])
    if limits["report"]:
        print(json.dumps(standing), flush=True)
        os._exit(0)
    limit(limits)
    os.chdir(folder)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
