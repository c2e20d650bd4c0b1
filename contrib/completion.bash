# bash completion for xnbd-server(8) and xnbd-bgctl(1): options are those that --help tells, and
# all else is a file.

_xnbd()
{
	COMPREPLY=()
	if [[ $2 == -* ]]; then
		mapfile -t COMPREPLY < <(compgen -W "$("$1" --help 2>/dev/null |
			sed -n 's/^  [-A-Za-z, ]\{4\}\(--[a-z0-9-]*\).*/\1/p')" -- "$2")
	fi
} && complete -o default -F _xnbd xnbd-server xnbd-bgctl
