// SPDX-License-Identifier: Apache-2.0

package policy

import "testing"

func TestRepoDigest(t *testing.T) {
	for _, tt := range []struct{ image, digests, want string }{
		{"quay.io/x/y:1", "quay.io/x/y@sha256:11", "sha256:11"},
		{"quay.io/x/y:1", "localhost/y@sha256:22,quay.io/x/y@sha256:11", "sha256:11"},
		{"y@sha256:22", "y@sha256:22,y@sha256:11", "sha256:22"},
		{"renamed:1", "y@sha256:22", "sha256:22"},
		{"y:1", "", ""},
		{"y:1", "no digest", ""},
		{"", "@", ""},
	} {
		if got := RepoDigest(tt.image, tt.digests); got != tt.want {
			t.Errorf("%s of %q: got %q, want %q", tt.image, tt.digests, got, tt.want)
		}
	}
}
