// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

const maxPattern = 512

// checkGlob says what is wrong with a pattern of the package comment's language.
func checkGlob(pattern string) error {
	switch {
	case pattern == "":
		return errors.New("empty pattern")
	case len(pattern) > maxPattern:
		return fmt.Errorf("pattern is longer than %d bytes", maxPattern)
	case !utf8.ValidString(pattern):
		return fmt.Errorf("pattern %q is not UTF-8", pattern)
	case strings.ContainsFunc(pattern, unicode.IsSpace):
		return fmt.Errorf("pattern %q has a space, so it matches nothing", pattern)
	}
	for i := 0; i < len(pattern); {
		n, _, err := element(pattern[i:], 'x')
		if err != nil {
			return fmt.Errorf("pattern %q: %w", pattern, err)
		}
		i += n
	}
	return nil
}

// matchGlob reports whether a pattern matches the whole of s, in time at worst
// proportional to the product of their lengths: only the last '*' is ever tried
// again. A pattern that checkGlob refuses matches nothing from its fault on.
func matchGlob(pattern, s string) bool {
	i, j := 0, 0
	star, retry := -1, 0
	for j < len(s) {
		if i < len(pattern) && pattern[i] == '*' {
			star, retry = i, j
			i++
			continue
		}
		r, size := utf8.DecodeRuneInString(s[j:])
		if i < len(pattern) {
			if n, ok, err := element(pattern[i:], r); err == nil && ok {
				i += n
				j += size
				continue
			}
		}
		if star < 0 {
			return false
		}
		_, size = utf8.DecodeRuneInString(s[retry:])
		retry += size
		i, j = star+1, retry
	}
	return strings.Trim(pattern[i:], "*") == ""
}

// element matches the first element of a pattern with one rune, and returns
// the element's length in bytes.
func element(pattern string, r rune) (int, bool, error) {
	switch pattern[0] {
	case '*', '?':
		return 1, true, nil
	case '[':
		return class(pattern, r)
	}
	want, n, err := char(pattern)
	return n, want == r, err
}

// char reads one literal character.
func char(pattern string) (rune, int, error) {
	if pattern == "" {
		return 0, 0, errors.New("character class without its ]")
	}
	if pattern[0] != '\\' {
		r, n := utf8.DecodeRuneInString(pattern)
		return r, n, nil
	}
	if len(pattern) == 1 {
		return 0, 0, errors.New(`ends in \ (write \\ for the character itself)`)
	}
	r, n := utf8.DecodeRuneInString(pattern[1:])
	return r, n + 1, nil
}

// class matches a character class, whose '[' is pattern's first byte.
func class(pattern string, r rune) (int, bool, error) {
	i := 1
	negated := i < len(pattern) && (pattern[i] == '!' || pattern[i] == '^')
	if negated {
		i++
	}
	found := false
	for start := i; ; {
		if i < len(pattern) && pattern[i] == ']' {
			if i == start {
				return 0, false, errors.New("empty character class")
			}
			return i + 1, found != negated, nil
		}
		low, n, err := char(pattern[i:])
		if err != nil {
			return 0, false, err
		}
		i += n
		high := low
		if strings.HasPrefix(pattern[i:], "-") && !strings.HasPrefix(pattern[i:], "-]") {
			if high, n, err = char(pattern[i+1:]); err != nil {
				return 0, false, err
			}
			i += 1 + n
		}
		if high < low {
			return 0, false, fmt.Errorf("reversed range %c-%c", low, high)
		}
		found = found || low <= r && r <= high
	}
}

// literal returns what a pattern without wildcards matches.
func literal(pattern string) (string, bool) {
	if strings.ContainsAny(pattern, `*?[`) {
		return "", false
	}
	var b strings.Builder
	for i := 0; i < len(pattern); i++ {
		if pattern[i] == '\\' && i+1 < len(pattern) {
			i++
		}
		b.WriteByte(pattern[i])
	}
	return b.String(), true
}

// image is a reference in its parts: docker.io/library/nginx, 1.27, sha256:...
type image struct{ repository, tag, digest string }

// parseImage takes a reference apart the way docker and containerd do. A bare
// image id ("sha256:...", or 64 hex digits) has no repository.
func parseImage(ref string) image {
	var im image
	rest, digest, _ := strings.Cut(ref, "@")
	im.digest = digest
	if strings.HasPrefix(rest, "sha256:") || len(rest) == 64 && strings.Trim(rest, "0123456789abcdef") == "" {
		return im
	}
	if colon := strings.LastIndexByte(rest, ':'); colon > strings.LastIndexByte(rest, '/') {
		rest, im.tag = rest[:colon], rest[colon+1:]
	}
	im.repository = qualify(rest)
	return im
}

// qualify adds docker.io, and library/, where docker would.
func qualify(repository string) string {
	if repository == "" {
		return ""
	}
	host, path, ok := strings.Cut(repository, "/")
	switch {
	case !ok:
		return "docker.io/library/" + repository
	case host == "index.docker.io":
		host = "docker.io"
		fallthrough
	case host == "docker.io":
		if !strings.Contains(path, "/") {
			path = "library/" + path
		}
		return host + "/" + path
	case strings.ContainsAny(host, ".:") || host == "localhost":
		return repository
	}
	return "docker.io/" + repository
}

// forms are the spellings that an image pattern is compared with. An image
// without a name has the empty one, which "*" matches: a policy for every image
// must not be escaped by naming none.
func (im image) forms() []string {
	if im.repository == "" {
		return []string{""}
	}
	forms := []string{im.repository}
	if im.tag != "" {
		forms = append(forms, im.repository+":"+im.tag)
	}
	if im.digest != "" {
		forms = append(forms, im.repository+"@"+im.digest)
		if im.tag != "" {
			forms = append(forms, im.repository+":"+im.tag+"@"+im.digest)
		}
	}
	return forms
}

// imagePattern normalises a pattern as parseImage does a reference.
func imagePattern(pattern string) string {
	host, path, hasHost := strings.Cut(pattern, "/")
	if strings.IndexAny(pattern, `*?[\`) == 0 || hasHost && strings.ContainsAny(host, `*?[\`) {
		return pattern
	}
	if !hasHost {
		return "docker.io/library/" + pattern
	}
	// docker.io/b* may mean docker.io/bitnami/...: library/ is added only to
	// what is a whole name.
	name, _, _ := strings.Cut(path, ":")
	if host == "docker.io" && strings.ContainsAny(name, `*?[\\`) {
		return pattern
	}
	return qualify(pattern)
}
