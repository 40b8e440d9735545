#!/bin/bash
# Runs in the new root as its last step: settings, mount points, and out with what a read-only system
# without a package manager does not need.
set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

# Git's helpers in Perl are not those that builds call; with them gone, so is Perl.
# Their scripts are not run: debconf, which those would ask, goes too.
for package in git-man liberror-perl perl perl-base 'perl-modules-*' 'libperl*' libgdbm-compat4t64 libgdbm6t64 \
    debconf sensible-utils; do
    for name in $(dpkg-query -W -f '${db:Status-Abbrev}${binary:Package}\n' "$package" 2>/dev/null |
        sed -n 's/^ii *//p'); do
        dpkg-query -L "$name" | while IFS= read -r file; do
            [ -d "$file" ] && [ ! -L "$file" ] || rm -f "$file"
        done
        awk -v name="${name%%:*}" -v RS= -v ORS='\n\n' '$0 !~ "^Package: " name "\n"' \
            /var/lib/dpkg/status >/var/lib/dpkg/status.new
        mv /var/lib/dpkg/status.new /var/lib/dpkg/status
    done
done

# root, nobody and the groups that device nodes and docker.sock belong to.
cat >/etc/passwd <<'END'
root:x:0:0:root:/root:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
END
cat >/etc/group <<'END'
root:x:0:
tty:x:5:
disk:x:6:
kmem:x:15:
shadow:x:42:
docker:x:999:
nogroup:x:65534:
END
printf 'root:*:20000:0:99999:7:::\nnobody:*:20000:0:99999:7:::\n' >/etc/shadow
chmod 0600 /etc/shadow
rm -f /etc/{passwd,group,shadow,gshadow,subuid,subgid}- /etc/gshadow /etc/subuid /etc/subgid

: >/etc/hostname
: >/etc/resolv.conf
: >/etc/machine-id
: >/etc/fstab
cat >/etc/hosts <<'END'
127.0.0.1 localhost
::1 localhost ip6-localhost ip6-loopback
END
cat >/etc/nsswitch.conf <<'END'
passwd: files
group: files
shadow: files
hosts: files dns
networks: files
protocols: files
services: files
END
echo 'LANG=C.UTF-8' >/etc/default/locale
cat >/etc/profile <<'END'
# Shells of people in `dhow shell`.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LANG=${LANG:-C.UTF-8} PAGER=less EDITOR=vi
if [ -n "${BASH_VERSION:-}" ] && [ -r /etc/bash.bashrc ]; then . /etc/bash.bashrc; fi
END
cat >/etc/bash.bashrc <<'END'
[ -z "$PS1" ] && return
shopt -s checkwinsize
PS1='\h:\w\$ '
alias ls='ls --color=auto' ll='ls -l'
END
ln -sf vim.tiny /usr/bin/vi

# Programs of the docker bundle, which the agent mounts there.
mkdir -p /opt/dhow /usr/local/bin /usr/local/lib/docker
for program in docker dockerd containerd ctr runc; do
    ln -s "/opt/dhow/docker/bin/$program" "/usr/local/bin/$program"
done
ln -s /opt/dhow/docker/cli-plugins /usr/local/lib/docker/cli-plugins

# The mount points of a read-only root.
mkdir -p /proc /sys /dev /run /tmp /data /mnt /home /root /var/lib/docker /var/lib/containerd /lib/modules
chmod 0700 /root
chmod 1777 /tmp

# Out: manuals and other languages, package management, units of a systemd that is not there.
rm -rf /usr/share/{doc,man,info,locale,lintian,bug,bash-completion,zsh,fish,pixmaps,gdb,gitweb,git-core/contrib} \
    /usr/share/{doc-base,menu,applications,icons,polkit-1,debianutils,apparmor,initramfs-tools} \
    /usr/share/{perl,perl5} /usr/lib/x86_64-linux-gnu/{perl,perl5,perl-base} /usr/lib/git-core/perl5 \
    /usr/lib/systemd /usr/lib/udev /usr/lib/init /usr/lib/tmpfiles.d /usr/lib/sysusers.d /etc/systemd /etc/init.d /etc/rc?.d \
    /etc/cron.* /etc/logrotate.d /etc/kernel /etc/pam.d /etc/security /etc/selinux /etc/alternatives/*.gz \
    /usr/lib/dpkg/methods /var/cache/debconf /var/log/* /var/lib/dpkg/{info,triggers,updates,alternatives} \
    /var/lib/dpkg/*-old /var/lib/{pam,systemd,vim,misc} /var/backups /boot /media /srv /tmp/* /finish.sh
find /usr/lib/x86_64-linux-gnu/gconv -type f ! -name 'UTF-*' ! -name 'ISO8859-1.so' ! -name 'gconv-modules*' -delete 2>/dev/null || true
# Libraries and programs of what went out.
find /usr/bin /usr/sbin /usr/lib/git-core -type f -size -200k -print0 |
    xargs -0 grep -lIE '^#! ?/usr/bin/perl' | xargs -r rm -f
# Links that lead nowhere now; those into the bundle lead to a later mount.
find / -xdev -xtype l ! -path '/proc/*' ! -path '/sys/*' ! -path '/dev/*' ! -lname '/opt/dhow/*' ! -lname '/proc/*' -delete
