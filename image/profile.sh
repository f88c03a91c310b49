# Debian's /etc/profile sets PATH anew in a login shell, which KubeRay can be told to start containers with.
PATH=/opt/isthmus/bin:$PATH
