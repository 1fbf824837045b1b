// SPDX-License-Identifier: Apache-2.0

package store

import (
	"crypto/sha256"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

var hostile = []string{
	"", ".", "..", "...", "/", "//", "../..", "../../etc/passwd", "/etc/passwd", "a/../b", ".tmp-x", ".git",
	"a", "A", "a/b", "a%2Fb", "a%2fb", "a%252Fb", "%", "%~", "%2E", "~", "a\x00b", "a\x00", "\n", "a\nb", " ", "a ", "\\", "a:b",
	"lock", "active", "workload", "versions/000001", "NUL", "é", "e\u0301", "É", "ſ", "K", "\u202e", "日本語", "-rf", "a.", "a..",
	strings.Repeat("a", 199), strings.Repeat("a", 200), strings.Repeat("a", 201), strings.Repeat("a", 10_000),
	strings.Repeat("a", 9_999) + "b", strings.Repeat("/", 10_000), strings.Repeat("../", 3_000), strings.Repeat("日", 3_000),
	strings.Repeat("A", 67), "docker.io/library/nginx@sha256:" + strings.Repeat("0", 64) + "/web",
}

func TestEncodeName(t *testing.T) {
	for name, want := range map[string]string{
		"":                            "%",
		"docker.io/library/nginx/web": "docker.io%2Flibrary%2Fnginx%2Fweb",
		"..":                          "%2E.",
		"A":                           "%41",
		"%":                           "%25",
	} {
		if got := encodeName(name); got != want {
			t.Errorf("%q: got %s, want %s", name, got, want)
		}
	}
}

func FuzzEncodeName(f *testing.F) {
	for i, a := range hostile {
		f.Add(a, hostile[(i+1)%len(hostile)])
	}
	for _, name := range hostile {
		f.Add(name, encodeName(name))
		f.Add(name, strings.ToUpper(name))
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		x, y := encodeName(a), encodeName(b)
		if a != b && strings.EqualFold(x, y) {
			t.Errorf("%q and %q are both %q", a, b, x)
		}
		if x == "" || len(x) > maxName || x[0] == '.' || strings.HasPrefix(x, leftover) || !filepath.IsLocal(x) {
			t.Errorf("%q: %q", a, x)
		}
		for i := range len(x) {
			if c := x[i]; !plain(c) && (c < 'A' || c > 'F') && !strings.ContainsRune(".%~", rune(c)) {
				t.Errorf("%q: %q holds %q", a, x, c)
			}
		}
	})
}

func FuzzRecordingName(f *testing.F) {
	for _, s := range append(hostile, "20261124T150102.123456789Z-1f2e3d4c", "a.sha256-0") {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, id string) {
		if checkID(id) != nil {
			return
		}
		name := recordingName(id, sha256.Sum256([]byte(id)))
		if len(name) > 255-len(leftover) || !filepath.IsLocal(name) || strings.ContainsAny(name, "/\x00") || name[0] == '.' {
			t.Errorf("%q: %q", id, name)
		}
		got, _, err := splitRecordingName(name)
		if err != nil || got != id {
			t.Errorf("%q: got %q, %v", id, got, err)
		}
	})
}

// Hostile names stay inside the store and apart from each other.
func TestHostileNames(t *testing.T) {
	top := t.TempDir()
	s := open(t, filepath.Join(top, "x", "y", "store"), Options{})
	for _, name := range hostile {
		add(t, s, recording(name, "r1", "read"), activate)
	}
	all, err := s.Workloads()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, sum := range all {
		got = append(got, sum.Workload)
		if sum.Versions != 1 || sum.Observations != 1 || sum.Active != 1 {
			t.Errorf("%.60q: %+v: shared with another", sum.Workload, sum)
		}
		if v, err := s.Active(sum.Workload); err != nil || v.Manifest.Workload != sum.Workload {
			t.Errorf("%.60q: %v", sum.Workload, err)
		}
	}
	want := slices.Sorted(slices.Values(hostile))
	if !slices.Equal(got, want) {
		t.Errorf("got %.60q, want %.60q", got, want)
	}
	for _, d := range []string{top, filepath.Join(top, "x"), filepath.Join(top, "x", "y")} {
		if entries, err := os.ReadDir(d); err != nil || len(entries) != 1 {
			t.Errorf("%s: %v, %v", d, entries, err)
		}
	}
	for _, name := range hostile {
		if !utf8.ValidString(name) {
			t.Errorf("%q is refused anyway", name)
		}
	}
}
