#compdef xnbd-server xnbd-bgctl
# zsh completion for xnbd-server(8) and xnbd-bgctl(1): options are those that --help tells.

local -a options

if [[ $PREFIX == -* ]]; then
	options=(${(f)"$($words[1] --help 2>/dev/null |
		sed -n 's/^  [-A-Za-z, ]\{4\}\(--[a-z0-9-]*\)\( [][A-Z=]*\)\{0,1\}  *\(.*\)/\1:\3/p')"})
	_describe -o option options
else
	_files
fi
