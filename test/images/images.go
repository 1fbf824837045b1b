// SPDX-License-Identifier: Apache-2.0

// Package images builds the container image of the real workloads, without a
// registry: Debian's own packages, unpacked and not installed, so that no
// maintainer script runs and no daemon starts on the machine that builds it.
//
// Building needs root, mmdebstrap and the network. The archive is kept in the
// cache that SYSLATCH_CACHE names, under a key of everything that goes into it
// except the packages' versions: remove it there to get newer ones.
package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/syslatch/syslatch/test/harness"
)

// WorkloadsImage is the name that the image has when imported.
const WorkloadsImage = "syslatch.test/workloads:1"

// packages whose dependencies come along. nodejs is Debian's even where apt has
// another one: the build has sources of its own.
var packages = []string{
	"dash", "coreutils", "nginx", "redis-server", "redis-tools",
	"python3-minimal", "libpython3-stdlib", "nodejs",
}

// sources are Debian's alone, whatever apt on this machine has besides.
var sources = []string{
	"deb http://deb.debian.org/debian bookworm main",
	"deb http://deb.debian.org/debian-security bookworm-security main",
}

// excluded is what no workload reads; half of the image.
var excluded = []string{
	"/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/perl/*",
	"/usr/lib/x86_64-linux-gnu/perl/*", "/usr/lib/x86_64-linux-gnu/gconv/*",
	"/usr/share/nodejs/@types/*", "/usr/share/bash-completion/*", "/usr/share/lintian/*",
}

// The users that nginx drops to; maintainer scripts would have made them.
const passwd = `root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
`

const group = `root:x:0:
www-data:x:33:
nogroup:x:65534:
`

// Workloads returns the image, from the cache if it is there.
func Workloads(ctx context.Context) (_ *harness.Image, err error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %q %q %q %q", WorkloadsImage, packages, sources, excluded, passwd, group, hook))
	archive := filepath.Join(cache, "workloads-"+hex.EncodeToString(sum[:8])+".tar")
	image := &harness.Image{Name: WorkloadsImage, Archive: archive}
	if _, err := os.Stat(archive); err == nil {
		return image, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	// Beside the archive: the rename below has to stay on one file system.
	dir, err := os.MkdirTemp(cache, ".build-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	layer := filepath.Join(dir, "layer.tar")
	if err := rootfs(ctx, dir, layer); err != nil {
		return nil, err
	}
	built, err := harness.FromLayer(dir, WorkloadsImage, layer, []string{"/bin/sh"})
	if err != nil {
		return nil, err
	}
	// A reader sees all of the archive or none of it.
	return image, os.Rename(built.Archive, archive)
}

// hook makes what packages don't carry; $1 is the root, $ETC our files.
const hook = `set -eu; mkdir -p "$1"/etc "$1"/proc "$1"/sys "$1"/dev "$1"/root "$1"/tmp; chmod 1777 "$1"/tmp; ` +
	`cp "$ETC"/passwd "$ETC"/group "$1"/etc/`

func cacheDir() (string, error) {
	dir := os.Getenv("SYSLATCH_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("set SYSLATCH_CACHE: %w", err)
		}
		dir = filepath.Join(user, "syslatch")
	}
	return filepath.Join(dir, "images"), nil
}

func rootfs(ctx context.Context, dir, layer string) error {
	for name, data := range map[string]string{"passwd": passwd, "group": group} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
			return err
		}
	}
	args := []string{
		"--quiet", "--variant=extract", "--mode=root", "--format=tar",
		"--include=" + strings.Join(packages, ","),
		"--extract-hook=" + hook, // this variant runs no customize hooks
	}
	for _, e := range excluded {
		args = append(args, "--dpkgopt=path-exclude="+e)
	}
	cmd := exec.CommandContext(ctx, "mmdebstrap", append(append(args, "bookworm", layer), sources...)...)
	cmd.Env = append(os.Environ(), "ETC="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mmdebstrap (apt-get install mmdebstrap; needs root and Debian's mirror): %w\n%s", err, out)
	}
	return nil
}
