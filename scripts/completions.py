#!/usr/bin/env python3
"""Make shell completions from the commands: `files()` maps paths below `share` to text.

They are static: a key press starts no Python.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import click

from kho.cli import TASKS, cli

ABOUT = "Made by scripts/completions.py."
TAKES_FILE = {"--output", "--all", "--keep", "--calibration", "--parquet"}
"""Options whose value is a path, in addition to those that click knows to be one."""
NO_FILES = {"ps", "plan", "simulate", "release", "hold"}
"""Commands whose arguments are no paths; `kho hold` takes a command."""


class Option(NamedTuple):
    """An option: its names, its help, and what its value is."""

    names: list[str]
    text: str
    flag: bool
    choices: list[str]
    file: bool


def options(command: click.Command) -> list[Option]:
    """List the options of a command, with --help."""
    found = []
    for param in command.get_params(click.Context(command, help_option_names=["-h", "--help"])):
        if isinstance(param, click.Option) and not param.hidden:
            choices = list(map(str, param.type.choices)) if isinstance(param.type, click.Choice) else []
            file = isinstance(param.type, click.Path) or bool(TAKES_FILE & {*param.opts})
            flag = param.is_flag or param.count
            text = " ".join((param.help or "").split())
            found.append(Option([*param.opts, *param.secondary_opts], text, flag, choices, file and not flag))
    return found


def bash() -> str:
    """Write the completion for bash."""
    words, values = [], []
    for name, command in cli.commands.items():
        each = options(command)
        words.append(f'        {name}) words="{" ".join(opt for option in each for opt in option.names)}" ;;')
        for option in each:
            patterns = "|".join(f"{name}/{opt}" for opt in option.names)
            if option.choices:
                answer = f'compgen -W "{" ".join(option.choices)}" -- "$cur"'
                values.append(f"        {patterns}) mapfile -t COMPREPLY < <({answer}); return ;;")
            elif not option.flag and not option.file:
                values.append(f"        {patterns}) compopt +o default; return ;;")
    return f"""# bash completion of kho. {ABOUT}
_kho() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}} command="" words="" i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${{COMP_WORDS[i]}} != -* ]]; then
            command=${{COMP_WORDS[i]}}
            break
        fi
    done
    if [[ -z $command ]]; then
        mapfile -t COMPREPLY < <(compgen -W "{" ".join(cli.commands)} --help --version" -- "$cur")
        return
    fi
    # An option that takes a value; without an answer here, file names are completed.
    case $command/$prev in
{chr(10).join(values)}
    esac
    [[ $cur == -* ]] || return
    case $command in
{chr(10).join(words)}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}}
complete -o default -F _kho kho
"""


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def fish() -> str:
    """Write the completion for fish."""
    lines = [f"# fish completion of kho. {ABOUT}"]
    lines += ["complete -c kho -n __fish_use_subcommand -s h -l help -d 'Show help'"]
    lines += ["complete -c kho -n __fish_use_subcommand -l version -d 'Show the version'"]
    for name, command in cli.commands.items():
        about = TASKS.get(name, (command.get_short_help_str(200), ""))[0]
        lines.append(f"complete -c kho -n __fish_use_subcommand -f -a {name} -d {_quoted(about)}")
        seen = f"complete -c kho -n '__fish_seen_subcommand_from {name}'"
        if name in NO_FILES - {"hold"}:
            lines.append(f"{seen} -f")
        for option in options(command):
            names = " ".join(f"-l {opt[2:]}" if opt.startswith("--") else f"-s {opt[1:]}" for opt in option.names)
            value = "" if option.flag else " -r" if option.file else " -x"
            if option.choices:
                value += f" -a {_quoted(' '.join(option.choices))}"
            lines.append(f"{seen} {names}{value} -d {_quoted(option.text)}")
    return "\n".join(lines) + "\n"


def _described(text: str) -> str:
    """Escape a description inside brackets of _arguments."""
    return text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")


def zsh() -> str:
    """Write the completion for zsh."""
    commands, cases = [], []
    for name, command in cli.commands.items():
        about = TASKS.get(name, (command.get_short_help_str(200), ""))[0]
        commands.append(f"        {_quoted(name + ':' + about.replace(':', chr(92) + ':'))}")
        specs = []
        for option in options(command):
            if option.flag:
                value = ""
            elif option.choices:
                value = f":value:({' '.join(option.choices)})"
            else:
                value = ":file:_files" if option.file else ":value: "
            group = f"({' '.join(option.names)})" if len(option.names) > 1 else ""
            specs += [_quoted(f"{group}{opt}[{_described(option.text)}]{value}") for opt in option.names]
        rest = "'*:argument: '" if name in NO_FILES else "'*:source:_files'"
        rest = "'1:name: ' '*::command:_normal'" if name == "hold" else rest
        lines = [f"        {name})", "            _arguments \\", *(f"                {spec} \\" for spec in specs)]
        cases.append("\n".join([*lines, f"                {rest}", "            ;;"]))
    return f"""#compdef kho
# zsh completion of kho. {ABOUT}
_kho() {{
    local curcontext=$curcontext state line
    local -a commands=(
{chr(10).join(commands)}
    )
    _arguments -C '(- *)'{{-h,--help}}'[Show help]' '(- *)--version[Show the version]' \\
        '1:command:->command' '*::argument:->argument'
    case $state in
    command) _describe command commands ;;
    argument)
        curcontext=${{curcontext%:*}}-$words[1]:
        case $words[1] in
{chr(10).join(cases)}
        esac
        ;;
    esac
}}
_kho "$@"
"""


def files() -> dict[str, str]:
    """Write all of them."""
    return {
        "bash-completion/completions/kho": bash(),
        "fish/vendor_completions.d/kho.fish": fish(),
        "zsh/site-functions/_kho": zsh(),
    }


if __name__ == "__main__":
    sys.stdout.write(
        {path.split("/")[0].removesuffix("-completion"): text for path, text in files().items()}[sys.argv[1]]
    )
