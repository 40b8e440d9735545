#!/usr/bin/env bash
# The main job: starts the default profile, builds the image dhow/hello on the spot and runs it, with the host's docker.
set -euo pipefail
cd "$(dirname "$0")/.."
setup/busybox.sh

build/bin/dhow start --image build/image

# The host's own docker CLI; where there is none, the one of the image.
docker=$(command -v docker || echo "$PWD/build/image/.cache/docker/cli/docker")
cat >build/hello/Dockerfile <<'DOCKERFILE'
FROM scratch
COPY busybox /bin/busybox
CMD ["/bin/busybox", "sh", "-c", "echo \"Hello from a container in Dhow ($(/bin/busybox uname -sr))\""]
DOCKERFILE
# The plain builder: a CLI without the buildx plugin has no other. Its advice to take the other is kept back.
build() {
    local log=build/hello/build.log
    DOCKER_BUILDKIT=0 "$docker" --context dhow build --tag dhow/hello build/hello >"$log" 2>&1 || {
        cat "$log" >&2
        return 1
    }
}
export -f build
export docker
setup/timed.sh "docker build" bash -c build
setup/timed.sh "docker run" "$docker" --context dhow run --rm dhow/hello
[[ $docker == */build/image/* ]] && printf 'There is no docker CLI on this machine; the one of the image is %s\n' "$docker"
exit 0
