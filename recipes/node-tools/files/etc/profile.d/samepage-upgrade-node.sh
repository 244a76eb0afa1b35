[ -z "${BASH_VERSION:-}" ] || . /opt/samepage/share/bash-completion/samepage-upgrade-node
