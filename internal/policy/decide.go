// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// ErrAnnotation is wrapped by errors that a pod's annotation causes.
var ErrAnnotation = errors.New("bad annotation")

// ErrWorkload is wrapped by errors about a workload name that can't be made.
var ErrWorkload = errors.New("no valid workload name")

// Decide finds the policy of a container and what it asks for. The decision is
// complete but for Workload and Mode when an error is returned: its Failure
// then says what is to happen to the container, which is always deny for an
// [ErrAnnotation]: else a pod's author could escape by a value that nobody can
// obey. Decide is safe for concurrent use as long as the File isn't changed.
func (f *File) Decide(c Container) (Decision, error) {
	im := parseImage(c.Image)
	if im.digest == "" {
		// The digest alone, or a reference with it.
		im.digest = c.ImageDigest[strings.LastIndexByte(c.ImageDigest, '@')+1:]
	}
	for i := range f.Policies {
		p := &f.Policies[i]
		if p.Match.matches(c, im) {
			return p.decide(c, im)
		}
	}
	return Decision{Mode: ModeOff, Failure: FailureRuntimeDefault, Reasons: []string{"no policy matches"}}, nil
}

func (p *Policy) decide(c Container, im image) (Decision, error) {
	d := Decision{
		Policy:          p.Name,
		Mode:            p.Mode,
		Limits:          p.Limits,
		MustAllow:       p.MustAllow,
		MustDeny:        p.MustDeny,
		Architectures:   p.Architectures,
		ExistingProfile: p.ExistingProfile,
		Activate:        p.Activate,
		AllowLosses:     p.AllowLosses,
		LogDenials:      p.LogDenials,
		Reasons:         []string{fmt.Sprintf("policy %s matches", p.Name)},
	}
	d.Reasons = append(d.Reasons, strangeAnnotations(c.Annotations)...)

	mode, modeErr := p.mode(c, &d)
	if modeErr != nil {
		d.Failure = FailureDeny
		return d, fmt.Errorf("policy %s: %w", p.Name, modeErr)
	}
	d.Mode, d.Failure = mode, p.failure(mode)
	if mode == ModeOff {
		return d, nil
	}
	workload, err := p.workload(c, im, &d)
	if err == nil && c.User != nil {
		workload, err = ofUser(*c.User, workload)
	}
	if err != nil {
		if errors.Is(err, ErrAnnotation) {
			d.Failure = FailureDeny
		}
		return d, fmt.Errorf("policy %s: %w", p.Name, err)
	}
	d.Workload = workload
	if mode.hasPhases() && p.Phases != nil {
		if d.Phase, err = p.phase(c, &d); err != nil {
			d.Failure = FailureDeny
			return d, fmt.Errorf("policy %s: %w", p.Name, err)
		}
		d.Phases = p.Phases
	}
	return d, nil
}

// hasPhases: they are in force in the one mode, and marks of a recording in the other.
func (m Mode) hasPhases() bool { return m == ModeEnforce || m == ModeRecord }

// phase is the one that a container begins in.
func (p *Policy) phase(c Container, d *Decision) (string, error) {
	value, key, ok := annotation(c, AnnotationPhase)
	if !ok {
		return p.Phases.Initial, nil
	}
	if !slices.Contains(p.Annotations, FieldPhase) {
		d.Reasons = append(d.Reasons, fmt.Sprintf("annotation %s ignored: the policy doesn't let pods choose the phase", key))
		return p.Phases.Initial, nil
	}
	var names []string
	for _, phase := range p.Phases.Phases {
		names = append(names, phase.Name)
	}
	if !slices.Contains(names, value) {
		return "", fmt.Errorf("%w %s: value %s, want %s", ErrAnnotation, key, quote(value), oneOf(names))
	}
	d.Reasons = append(d.Reasons, fmt.Sprintf("phase %s from annotation %s", value, key))
	return value, nil
}

// userPrefix begins the workloads of rootless containers, "user@1000/", and no
// others: neither an image's repository nor any other placeholder's value has an @.
const userPrefix = "user@"

// ofUser keeps what a user's containers did apart from all other workloads.
func ofUser(u User, workload string) (string, error) {
	workload = userPrefix + strconv.FormatUint(uint64(u.UID), 10) + "/" + workload
	if len(workload) > MaxWorkloadSize {
		return "", fmt.Errorf("%w: %s is longer than %d bytes", ErrWorkload, quote(workload), MaxWorkloadSize)
	}
	return workload, nil
}

func (p *Policy) failure(mode Mode) Failure {
	switch {
	case p.Failure != "":
		return p.Failure
	case mode == ModeEnforce:
		return FailureDeny
	}
	return FailureRuntimeDefault
}

func (p *Policy) mode(c Container, d *Decision) (Mode, error) {
	value, key, ok := annotation(c, AnnotationMode)
	if !ok {
		return p.Mode, nil
	}
	if !slices.Contains(p.Annotations, FieldMode) {
		d.Reasons = append(d.Reasons, fmt.Sprintf("annotation %s ignored: the policy doesn't let pods choose the mode", key))
		return p.Mode, nil
	}
	mode := Mode(value)
	if !slices.Contains(modes, mode) {
		return "", fmt.Errorf("%w %s: value %s, want %s", ErrAnnotation, key, quote(value), oneOf(modes))
	}
	if mode != p.Mode && !slices.Contains(p.AllowedModes, mode) {
		d.Reasons = append(d.Reasons, fmt.Sprintf("annotation %s: %s ignored: the policy allows %s", key, mode, oneOf(p.AllowedModes)))
		return p.Mode, nil
	}
	d.Reasons = append(d.Reasons, fmt.Sprintf("mode %s from annotation %s", mode, key))
	return mode, nil
}

func (p *Policy) workload(c Container, im image, d *Decision) (string, error) {
	if value, key, ok := annotation(c, AnnotationWorkload); ok {
		if slices.Contains(p.Annotations, FieldWorkload) {
			if len(value) > MaxAnnotationSize {
				return "", fmt.Errorf("%w %s: longer than %d bytes", ErrAnnotation, key, MaxAnnotationSize)
			}
			if err := checkWorkload(value); err != nil {
				return "", fmt.Errorf("%w %s: %w", ErrAnnotation, key, err)
			}
			d.Reasons = append(d.Reasons, fmt.Sprintf("workload %s from annotation %s", value, key))
			return value, nil
		}
		d.Reasons = append(d.Reasons, fmt.Sprintf("annotation %s ignored: the policy doesn't let pods choose the workload", key))
	}
	name, err := expand(p.Workload, func(placeholder string) (string, error) {
		return placeholderValue(placeholder, c, im)
	})
	if err != nil {
		return "", fmt.Errorf("%w from template %q: %w", ErrWorkload, p.Workload, err)
	}
	if err := checkWorkload(name); err != nil {
		return "", fmt.Errorf("%w from template %q: %w", ErrWorkload, p.Workload, err)
	}
	return name, nil
}

// annotation looks a key up by NRI's convention (pkg/plugin.GetEffectiveAnnotation
// of github.com/containerd/nri). An empty container name has no scope of its own.
// The plain form comes last. found is fit for a message: it holds a name that the
// pod chose.
func annotation(c Container, key string) (value, found string, ok bool) {
	keys := []string{key + "/pod", key, plainKeys[key]}
	if c.Name != "" {
		keys = append([]string{key + "/container." + c.Name}, keys...)
	}
	for _, k := range keys {
		if v, ok := c.Annotations[k]; ok {
			return v, printable(k), true
		}
	}
	return "", "", false
}

const plainDomain = "syslatch.dev"

// strangeAnnotations names annotations that look like ours and mean nothing:
// a misspelt request must not pass in silence.
func strangeAnnotations(annotations map[string]string) []string {
	const most = 8
	var strange []string
	for k := range annotations {
		key, scope, scoped := strings.Cut(k, "/")
		if key == plainDomain && !slices.Contains(slices.Collect(maps.Values(plainKeys)), k) {
			strange = append(strange, fmt.Sprintf("annotation %s ignored: want %s, %s or %s", quote(k), plainKeys[AnnotationMode], plainKeys[AnnotationWorkload], plainKeys[AnnotationPhase]))
			continue
		}
		if !strings.HasSuffix(key, ".syslatch.dev") {
			continue
		}
		_, known := plainKeys[key]
		if !known || scoped && scope != "pod" && !strings.HasPrefix(scope, "container.") {
			strange = append(strange, fmt.Sprintf("annotation %s ignored: want %s, %s or %s, with /container.NAME, /pod or nothing behind it",
				quote(k), AnnotationMode, AnnotationWorkload, AnnotationPhase))
		}
	}
	slices.Sort(strange)
	if n := len(strange); n > most {
		strange = append(strange[:most], fmt.Sprintf("%d more unknown annotations ignored", n-most))
	}
	return strange
}

func (m *Match) matches(c Container, im image) bool {
	if !m.matchesUser(c.User) {
		return false
	}
	if len(m.Namespaces) > 0 && !anyMatch(m.Namespaces, c.Namespace) {
		return false
	}
	if len(m.Containers) > 0 && !anyMatch(m.Containers, c.Name) {
		return false
	}
	for label, pattern := range m.PodLabels {
		if value, ok := c.PodLabels[label]; !ok || !matchGlob(pattern, value) {
			return false
		}
	}
	if len(m.Images) == 0 {
		return true
	}
	forms := im.forms()
	for _, pattern := range m.Images {
		pattern = imagePattern(pattern)
		if slices.ContainsFunc(forms, func(form string) bool { return matchGlob(pattern, form) }) {
			return true
		}
	}
	return false
}

func (m *Match) matchesUser(u *User) bool {
	if u == nil || len(m.Users) == 0 {
		return u == nil && len(m.Users) == 0
	}
	return anyMatch(m.Users, strconv.FormatUint(uint64(u.UID), 10)) || u.Name != "" && anyMatch(m.Users, u.Name)
}

func anyMatch(patterns []string, value string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matchGlob(p, value) })
}

// RepoDigest finds the digest of an image in what CRI-O tells of it,
// "REPOSITORY@DIGEST,…". They are of one image, so that any will do where its
// repository isn't among them.
func RepoDigest(image, digests string) string {
	list := strings.Split(digests, ",")
	for _, d := range list {
		repository, digest, ok := strings.Cut(d, "@")
		if ok && (strings.HasPrefix(image, repository+":") || strings.HasPrefix(image, repository+"@")) {
			return digest
		}
	}
	_, digest, _ := strings.Cut(list[0], "@")
	return digest
}

var placeholders = regexp.MustCompile(`\{[^{}]*\}|[{}]`)

// expand replaces {placeholder}s. Values are not expanded again.
func expand(template string, value func(string) (string, error)) (string, error) {
	var failed error
	out := placeholders.ReplaceAllStringFunc(template, func(s string) string {
		if failed != nil {
			return ""
		}
		if len(s) == 1 {
			failed = fmt.Errorf("%q without its counterpart", s)
			return ""
		}
		v, err := value(s[1 : len(s)-1])
		if err != nil {
			failed = err
		}
		return v
	})
	return out, failed
}

// placeholderNames are those without an argument; {label:KEY} is one more.
var placeholderNames = []string{"namespace", "pod", "container", "image", "tag"}

func placeholderValue(name string, c Container, im image) (string, error) {
	var v string
	switch name {
	case "image":
		if im.repository == "" {
			return "", fmt.Errorf("the image's name is not known (reference %s)", quote(c.Image))
		}
		return im.repository, nil
	case "namespace":
		v = c.Namespace
	case "pod":
		v = c.Pod
	case "container":
		v = c.Name
	case "tag":
		v = im.tag
	default:
		key, ok := strings.CutPrefix(name, "label:")
		if !ok {
			return "", fmt.Errorf("unknown placeholder {%s}", name)
		}
		v = c.PodLabels[key]
	}
	if v == "" {
		return "", fmt.Errorf("{%s} is empty for this container", name)
	}
	// Else a container called "a/b" could claim a part of the name that the
	// policy meant to fix. It is all that Kubernetes and podman allow.
	if strings.TrimFunc(v, inValue) != "" {
		return "", fmt.Errorf("{%s} is %s: only letters, digits, '.', '_' and '-' are allowed there", name, quote(v))
	}
	return v, nil
}

// inValue are the characters of all placeholders' values but {image}'s.
func inValue(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r)
}

// checkTemplate refuses what could make one name of two workloads, and so let
// the recording of one widen the profile of the other: "{namespace}-{pod}" is
// a-b-c for the pod c of a-b and for b-c of a. Between two placeholders something
// must stand that no value has in it. {image} may have it, being alone in that:
// the others are found from both ends.
func checkTemplate(template string) error {
	seen := map[string]bool{}
	end := -1
	for _, at := range placeholders.FindAllStringIndex(template, -1) {
		name := template[at[0]:at[1]]
		if seen[name] {
			return fmt.Errorf("%s is there twice", name)
		}
		seen[name] = true
		if end >= 0 && strings.TrimFunc(template[end:at[0]], inValue) == "" {
			return fmt.Errorf("nothing tells where %s begins: different workloads could get one name, want a slash before it", name)
		}
		end = at[1]
	}
	return nil
}

// checkWorkload bounds a workload name: printable, of components between
// slashes of which none is empty, "." or "..".
func checkWorkload(name string) error {
	switch {
	case name == "":
		return errors.New("empty name")
	case len(name) > MaxWorkloadSize:
		return fmt.Errorf("name is longer than %d bytes", MaxWorkloadSize)
	case !utf8.ValidString(name):
		return fmt.Errorf("name %s is not UTF-8", quote(name))
	case strings.HasPrefix(name, userPrefix):
		return fmt.Errorf("name %s: %s begins the workloads of rootless containers, and is put there by itself", quote(name), userPrefix)
	}
	for _, r := range name {
		if !unicode.IsPrint(r) || r == ' ' || r == '\\' {
			return fmt.Errorf("name %s: character %q is not allowed", quote(name), r)
		}
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." {
			return fmt.Errorf("name %s: component %q is not allowed", quote(name), part)
		}
	}
	return nil
}

// quote bounds and escapes what a pod wrote before it gets into a message.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		return fmt.Sprintf("%q... (%d bytes)", s[:most], len(s))
	}
	return fmt.Sprintf("%q", s)
}

var modes = []Mode{ModeOff, ModeRecord, ModeAudit, ModeEnforce}

// oneOf lists choices: "a, b or c".
func oneOf[S ~string](choices []S) string {
	var b strings.Builder
	for i, c := range choices {
		switch {
		case i == 0:
		case i == len(choices)-1:
			b.WriteString(" or ")
		default:
			b.WriteString(", ")
		}
		b.WriteString(string(c))
	}
	return b.String()
}
