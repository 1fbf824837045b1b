// SPDX-License-Identifier: Apache-2.0

package store

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// NAME_MAX is 255 bytes; the rest is for what the store puts around a name.
const (
	maxName = 200
	maxID   = 128
)

func plain(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '_' || c == '-'
}

// encodeName turns a workload's name, which an image or an annotation may have
// chosen, into one path component: small letters, digits, "_", "-" and inner dots
// stand for themselves, every other byte is %XX, and the empty name is "%". What
// gets too long is cut and ends in "%~" and the name's SHA-256. Different names
// have different encodings, also where a file system (or a checkout of the store
// on another system) ignores case. None starts with a dot.
func encodeName(name string) string {
	if name == "" {
		return "%"
	}
	const suffix = len("%~") + 2*sha256.Size
	var b strings.Builder
	cut := 0 // where the last whole byte ends that leaves room for the suffix
	for i := 0; i < len(name) && b.Len() <= maxName; i++ {
		if c := name[i]; plain(c) || c == '.' && i > 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
		if b.Len() <= maxName-suffix {
			cut = b.Len()
		}
	}
	if b.Len() <= maxName {
		return b.String()
	}
	sum := sha256.Sum256([]byte(name))
	return b.String()[:cut] + "%~" + hex.EncodeToString(sum[:])
}

// checkName refuses the names that evidence, which is JSON, can't carry: two of
// them could read alike.
func checkName(workload string) error {
	if !utf8.ValidString(workload) {
		return fmt.Errorf("workload %.100q: its name must be valid UTF-8", workload)
	}
	return nil
}

// checkID accepts what is safe in a file name as it is.
func checkID(id string) error {
	for i := 0; i < len(id); i++ {
		if c := id[i]; !plain(c) && (c < 'A' || c > 'Z') && (c != '.' || i == 0) {
			return fmt.Errorf("recording id %.150q: byte %d: want letters, digits, '_', '-' and inner dots", id, i)
		}
	}
	if id == "" || len(id) > maxID {
		return fmt.Errorf("recording id of %d bytes: want 1 to %d", len(id), maxID)
	}
	return nil
}

const recordingMark = ".sha256-"

func recordingName(id string, sum [sha256.Size]byte) string {
	return id + recordingMark + hex.EncodeToString(sum[:]) + ".json"
}

// splitRecordingName undoes recordingName; the digest is in hex.
func splitRecordingName(name string) (id, digest string, err error) {
	base, ok := strings.CutSuffix(name, ".json")
	i := strings.LastIndex(base, recordingMark)
	if !ok || i < 0 || checkID(base[:i]) != nil {
		return "", "", errors.New("not a recording's name")
	}
	return base[:i], base[i+len(recordingMark):], nil
}
