// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const decideFile = `
apiVersion: syslatch.dev/v1
policies:
  - name: "off"
    match: {namespaces: [kube-*]}
    mode: off
  - name: fixed
    match: {namespaces: [fixed]}
    mode: enforce
    mustDeny: [bpf]
    limits: {pids: {max: 5}}
  - name: fixed-open
    match: {namespaces: [open]}
    mode: enforce
    failure: runtime-default
  - name: chosen
    match: {namespaces: [chosen]}
    mode: record
    annotations: [mode, workload]
    allowedModes: [audit, enforce]
  - name: lenient
    match: {namespaces: [lenient]}
    mode: audit
    failure: runtime-default
    annotations: [mode]
    allowedModes: [record]
  - name: labels
    match: {podLabels: {app: "web-?", tier: "*"}}
    mode: audit
    workload: "{namespace}/{label:app}/{pod}/{container}/{tag}"
  - name: images
    match: {images: [redis, "quay.io/*"], containers: ["[a-m]*"]}
    mode: record
`

func parsed(t testing.TB, text string) *File {
	t.Helper()
	f, err := Parse("test.yaml", []byte(text), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestDecide(t *testing.T) {
	f := parsed(t, decideFile)
	nginx := "docker.io/library/nginx/web"
	for _, tt := range []struct {
		name string
		c    Container
		want Decision // only the fields of a summary are compared
		err  error
		says string // in a reason, or in the error
	}{
		{"no match", Container{Namespace: "other"}, Decision{Mode: ModeOff, Failure: FailureRuntimeDefault}, nil, "no policy matches"},
		{"off", Container{Namespace: "kube-system"}, Decision{Policy: "off", Mode: ModeOff, Failure: FailureRuntimeDefault}, nil, "policy off matches"},
		{"default workload", Container{Namespace: "fixed", Name: "web", Image: "nginx:1.27"}, Decision{Policy: "fixed", Mode: ModeEnforce, Workload: nginx, Failure: FailureDeny}, nil, ""},
		{"explicit failure", Container{Namespace: "open", Name: "web", Image: "nginx"}, Decision{Policy: "fixed-open", Mode: ModeEnforce, Workload: nginx, Failure: FailureRuntimeDefault}, nil, ""},
		{"no image", Container{Namespace: "fixed", Name: "web"}, Decision{Policy: "fixed", Mode: ModeEnforce, Failure: FailureDeny}, ErrWorkload, "the image's name is not known"},
		{"image id", Container{Namespace: "fixed", Name: "web", Image: "sha256:" + strings.Repeat("a", 64)}, Decision{Policy: "fixed", Mode: ModeEnforce, Failure: FailureDeny}, ErrWorkload, "the image's name is not known"},

		{
			"annotation not permitted",
			Container{Namespace: "fixed", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationMode: "off", AnnotationWorkload + "/pod": "x"}},
			Decision{Policy: "fixed", Mode: ModeEnforce, Workload: nginx, Failure: FailureDeny},
			nil, "annotation mode.syslatch.dev ignored",
		},
		{
			"annotation permitted",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationMode: "enforce", AnnotationWorkload + "/pod": "team/x"}},
			Decision{Policy: "chosen", Mode: ModeEnforce, Workload: "team/x", Failure: FailureDeny},
			nil, "mode enforce from annotation mode.syslatch.dev",
		},
		{
			"own mode is allowed",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationMode: "record"}},
			Decision{Policy: "chosen", Mode: ModeRecord, Workload: nginx, Failure: FailureRuntimeDefault},
			nil, "mode record from annotation",
		},
		{
			"mode not allowed",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationMode: "off"}},
			Decision{Policy: "chosen", Mode: ModeRecord, Workload: nginx, Failure: FailureRuntimeDefault},
			nil, "off ignored: the policy allows audit or enforce",
		},
		{
			"bad mode",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationMode: "enfroce"}},
			Decision{Policy: "chosen", Mode: ModeRecord, Failure: FailureDeny},
			ErrAnnotation, `value "enfroce", want off, record, audit or enforce`,
		},
		{
			"bad mode under failure runtime-default",
			Container{Namespace: "lenient", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationMode: "none"}},
			Decision{Policy: "lenient", Mode: ModeAudit, Failure: FailureDeny},
			ErrAnnotation, `value "none"`,
		},
		{
			"container before pod before bare",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{
				AnnotationMode: "bad", AnnotationMode + "/pod": "bad", AnnotationMode + "/container.web": "audit", AnnotationMode + "/container.other": "bad",
			}},
			Decision{Policy: "chosen", Mode: ModeAudit, Workload: nginx, Failure: FailureRuntimeDefault},
			nil, "mode audit from annotation mode.syslatch.dev/container.web",
		},
		{
			"pod before bare",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationMode: "bad", AnnotationMode + "/pod": "enforce"}},
			Decision{Policy: "chosen", Mode: ModeEnforce, Workload: nginx, Failure: FailureDeny},
			nil, "",
		},
		{
			"misspelt annotations are named",
			Container{Namespace: "fixed", Name: "web", Image: "nginx", Annotations: map[string]string{"mod.syslatch.dev": "off", "mode.syslatch.dev/containers.web": "off"}},
			Decision{Policy: "fixed", Mode: ModeEnforce, Workload: nginx, Failure: FailureDeny},
			nil, `annotation "mod.syslatch.dev" ignored`,
		},
		{
			"bare before plain",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationMode: "enforce", "syslatch.dev/mode": "bad"}},
			Decision{Policy: "chosen", Mode: ModeEnforce, Workload: nginx, Failure: FailureDeny},
			nil, "",
		},
		{
			"plain",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{"syslatch.dev/mode": "enforce", "syslatch.dev/workload": "team/x"}},
			Decision{Policy: "chosen", Mode: ModeEnforce, Workload: "team/x", Failure: FailureDeny},
			nil, "mode enforce from annotation syslatch.dev/mode",
		},
		{
			"misspelt plain annotations are named",
			Container{Namespace: "fixed", Name: "web", Image: "nginx", Annotations: map[string]string{"syslatch.dev/mod": "off"}},
			Decision{Policy: "fixed", Mode: ModeEnforce, Workload: nginx, Failure: FailureDeny},
			nil, `annotation "syslatch.dev/mod" ignored`,
		},

		{
			"workload climbs",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationWorkload: "a/../../b"}},
			Decision{Policy: "chosen", Mode: ModeRecord, Failure: FailureDeny},
			ErrAnnotation, `component ".." is not allowed`,
		},
		{
			"workload absolute",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationWorkload: "/etc"}},
			Decision{Policy: "chosen", Mode: ModeRecord, Failure: FailureDeny},
			ErrAnnotation, `component "" is not allowed`,
		},
		{
			"workload with NUL",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationWorkload: "a\x00b"}},
			Decision{Policy: "chosen", Mode: ModeRecord, Failure: FailureDeny},
			ErrAnnotation, `character '\x00' is not allowed`,
		},
		{
			"workload not UTF-8",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationWorkload: "a\xff"}},
			Decision{Policy: "chosen", Mode: ModeRecord, Failure: FailureDeny},
			ErrAnnotation, "not UTF-8",
		},
		{
			"workload too long",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationWorkload: strings.Repeat("x", MaxWorkloadSize+1)}},
			Decision{Policy: "chosen", Mode: ModeRecord, Failure: FailureDeny},
			ErrAnnotation, "longer than 512 bytes",
		},
		{
			"workload empty",
			Container{Namespace: "chosen", Name: "web", Image: "nginx", Annotations: map[string]string{AnnotationWorkload: ""}},
			Decision{Policy: "chosen", Mode: ModeRecord, Failure: FailureDeny},
			ErrAnnotation, "empty name",
		},

		{
			"labels and template",
			Container{Namespace: "n", Pod: "p-1", Name: "c", Image: "x:5/y:v2", PodLabels: map[string]string{"app": "web-7", "tier": ""}},
			Decision{Policy: "labels", Mode: ModeAudit, Workload: "n/web-7/p-1/c/v2", Failure: FailureRuntimeDefault},
			nil, "",
		},
		{"label must be there", Container{Namespace: "n", PodLabels: map[string]string{"app": "web-7"}}, Decision{Mode: ModeOff, Failure: FailureRuntimeDefault}, nil, "no policy matches"},
		{
			"slash in a value",
			Container{Namespace: "n", Pod: "p", Name: "../c", Image: "x:v2", PodLabels: map[string]string{"app": "web-7", "tier": "a"}},
			Decision{Policy: "labels", Mode: ModeAudit, Failure: FailureRuntimeDefault},
			ErrWorkload, `{container} is "../c": only letters`,
		},
		{
			"empty value",
			Container{Namespace: "n", Pod: "p", Name: "c", Image: "x", PodLabels: map[string]string{"app": "web-7", "tier": "a"}},
			Decision{Policy: "labels", Mode: ModeAudit, Failure: FailureRuntimeDefault},
			ErrWorkload, "{tag} is empty",
		},
		{
			"values are not expanded",
			Container{Namespace: "{image}", Pod: "p", Name: "c", Image: "x:1", PodLabels: map[string]string{"app": "web-7", "tier": "a"}},
			Decision{Policy: "labels", Mode: ModeAudit, Failure: FailureRuntimeDefault},
			ErrWorkload, `{namespace} is "{image}": only letters`,
		},

		{
			"short image",
			Container{Name: "cache", Image: "docker.io/library/redis:7@sha256:" + strings.Repeat("b", 64)},
			Decision{Policy: "images", Mode: ModeRecord, Workload: "docker.io/library/redis/cache", Failure: FailureRuntimeDefault},
			nil, "",
		},
		{"container class", Container{Name: "zebra", Image: "redis"}, Decision{Mode: ModeOff, Failure: FailureRuntimeDefault}, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := f.Decide(tt.c)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error: got %v, want %v", err, tt.err)
			}
			summary := Decision{Policy: got.Policy, Mode: got.Mode, Workload: got.Workload, Failure: got.Failure}
			if diff := cmp.Diff(tt.want, summary); diff != "" {
				t.Errorf("decision (-want +got):\n%s", diff)
			}
			text := strings.Join(got.Reasons, "\n")
			if err != nil {
				text += "\n" + err.Error()
			}
			if !strings.Contains(text, tt.says) {
				t.Errorf("reasons and error are %q, want %q in them", text, tt.says)
			}
		})
	}
}

func TestDecisionSurvivesJSON(t *testing.T) {
	f, err := Load("testdata/example.yaml", Options{})
	if err != nil {
		t.Fatal(err)
	}
	want, err := f.Decide(Container{Namespace: "payments", Name: "c", Image: "nginx", PodLabels: map[string]string{"app": "api", "tier": "backend"}})
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got Decision
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("after JSON (-want +got):\n%s", diff)
	}
	if got.Limits.Pids == nil || len(got.MustDeny) != 3 {
		t.Errorf("decision lost limits or lists: %s", data)
	}
}

func TestGlob(t *testing.T) {
	for _, tt := range []struct {
		pattern, s string
		want       bool
	}{
		{"*", "", true},
		{"*", "a/b", true},
		{"a", "a", true},
		{"a", "b", false},
		{"a", "ab", false},
		{"", "", true},
		{"a*", "a", true},
		{"*a", "bca", true},
		{"*a", "ab", false},
		{"a*b*c", "aXbYbZc", true},
		{"a*b*c", "aXbYb", false},
		{"?", "é", true},
		{"?", "", false},
		{"??", "é", false},
		{"[a-c]x", "bx", true},
		{"[a-c]x", "dx", false},
		{"[!a-c]", "d", true},
		{"[^a-c]", "a", false},
		{"[a-]", "-", true},
		{`[\]]`, "]", true},
		{"[é-ï]", "ê", true},
		{`\*`, "*", true},
		{`\*`, "a", false},
		{`a\?`, "a?", true},
		{"a[*]", "a*", true},
		{"a[*]", "ab", false},
		{"**a**", "bab", true},
		{"[", "[", false},
		{"a.c", "abc", false},
		{"a", "a\n", false},
		{"a*", "a\nb", true},
	} {
		if got := matchGlob(tt.pattern, tt.s); got != tt.want {
			t.Errorf("matchGlob(%q, %q) = %v, want %v", tt.pattern, tt.s, got, tt.want)
		}
	}
	for _, bad := range []string{"", "[", "[]", "[!]", "[a", `a\`, "[c-a]", `[a\`, "\xff", strings.Repeat("a", 513)} {
		if checkGlob(bad) == nil {
			t.Errorf("checkGlob(%q) = nil, want an error", bad)
		}
	}
	// Would take longer than the age of the universe if every star were tried.
	if matchGlob(strings.Repeat("*a", 100)+"b", strings.Repeat("a", 4000)) {
		t.Error("pattern of stars matches what it must not")
	}
}

func TestImages(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0", 64)
	for _, tt := range []struct {
		ref                     string
		repository, tag, digest string
	}{
		{"nginx", "docker.io/library/nginx", "", ""},
		{"nginx:1.27", "docker.io/library/nginx", "1.27", ""},
		{"docker.io/nginx", "docker.io/library/nginx", "", ""},
		{"index.docker.io/nginx", "docker.io/library/nginx", "", ""},
		{"bitnami/redis:7", "docker.io/bitnami/redis", "7", ""},
		{"localhost/app", "localhost/app", "", ""},
		{"reg:5000/app", "reg:5000/app", "", ""},
		{"reg:5000/a/b:v@" + digest, "reg:5000/a/b", "v", digest},
		{"quay.io/a/b@" + digest, "quay.io/a/b", "", digest},
		{digest, "", "", ""},
		{strings.Repeat("f", 64), "", "", ""},
		{"", "", "", ""},
	} {
		im := parseImage(tt.ref)
		if im != (image{tt.repository, tt.tag, tt.digest}) {
			t.Errorf("parseImage(%q) = %+v, want %+v", tt.ref, im, tt)
		}
	}
	for _, tt := range []struct {
		pattern, ref string
		want         bool
	}{
		{"nginx", "nginx:1.27", true},
		{"nginx", "docker.io/library/nginx", true},
		{"nginx", "evil.io/nginx", false},
		{"nginx", "evil/nginx", false},
		{"nginx:1.*", "nginx:1.27", true},
		{"nginx:1.*", "nginx:2", false},
		{"*", "quay.io/x", true},
		{"*", "", true},
		{"*", digest, true},
		{"*/*", digest, false},
		{"*/nginx", "evil.io/x/nginx", true},
		{"docker.io/*", "bitnami/redis", true},
		{"docker.io/b*", "bitnami/redis", true},
		{"docker.io/nginx:1.*", "nginx:1.2", true},
		{"bitnami/*", "bitnami/redis:7", true},
		{"quay.io/a/*", "quay.io/a/b@" + digest, true},
		{"nginx@sha256:*", "nginx@" + digest, true},
		{"nginx:1@sha256:*", "nginx:1@" + digest, true},
		{"reg:5000/*", "reg:5000/app", true},
		{"nginx?", "nginxx", true},
		{"library/nginx", "nginx", true},
	} {
		m := Match{Images: []string{tt.pattern}}
		if got := m.matches(Container{}, parseImage(tt.ref)); got != tt.want {
			t.Errorf("image pattern %q on %q: got %v, want %v", tt.pattern, tt.ref, got, tt.want)
		}
	}
	f := parsed(t, "apiVersion: syslatch.dev/v1\npolicies: [{name: a, match: {images: ['nginx@"+digest+"']}, mode: record}]")
	for _, given := range []string{digest, "docker.io/library/nginx@" + digest} {
		if d, err := f.Decide(Container{Image: "nginx:1", ImageDigest: given, Name: "c"}); err != nil || d.Policy != "a" {
			t.Errorf("digest %q beside the reference: got policy %q, %v", given, d.Policy, err)
		}
	}
}

// TestNamesAreOnes: two workloads never get one name from a template that is
// accepted, so that no recording of one widens the profile of the other.
func TestNamesAreOnes(t *testing.T) {
	parts := append([]string{"{image}", "{label:a}", "{label:b.c/d}"}, "{namespace}", "{pod}", "{container}", "{tag}", "", "x", "a-")
	separators := []string{"", "-", ".", "/", "a/b", ":", "/-", "_", "-:x", "x"}
	pick := func(r *rand.Rand, from []string) string { return from[r.IntN(len(from))] }
	value := func(r *rand.Rand) string {
		return pick(r, []string{"a", "b", "a-b", "b-a", "a.b", "x", "a-x", "x-a", "ax", "a_"})
	}
	r := rand.New(rand.NewPCG(5, 6))
	accepted, refused := 0, 0
	for range 1500 {
		template := pick(r, parts)
		for range r.IntN(4) {
			template += pick(r, separators) + pick(r, parts)
		}
		text := "apiVersion: syslatch.dev/v1\npolicies: [{name: a, match: {}, mode: record, workload: '" + template + "'}]"
		f, err := Parse("x", []byte(text), Options{})
		if err != nil {
			refused++
			continue
		}
		accepted++
		names := map[string]string{}
		for range 100 {
			c := Container{
				Namespace: value(r), Pod: value(r), Name: value(r), PodLabels: map[string]string{"a": value(r), "b.c/d": value(r)},
				Image: pick(r, []string{"", "x.y/", "x.y:5/", "x.y/a/", "a/"}) + strings.ToLower(value(r)) + ":" + value(r),
			}
			d, err := f.Decide(c)
			if err != nil {
				t.Fatalf("%s: %v", template, err)
			}
			im := parseImage(c.Image)
			var used []string
			for placeholder, v := range map[string]string{
				"{namespace}": c.Namespace, "{pod}": c.Pod, "{container}": c.Name, "{tag}": im.tag,
				"{image}": im.repository, "{label:a}": c.PodLabels["a"], "{label:b.c/d}": c.PodLabels["b.c/d"],
			} {
				if strings.Contains(template, placeholder) {
					used = append(used, placeholder+"="+v)
				}
			}
			slices.Sort(used)
			who := strings.Join(used, " ")
			if other, ok := names[d.Workload]; ok && other != who {
				t.Fatalf("template %s: %s is the name of %s and of %s", template, d.Workload, other, who)
			}
			names[d.Workload] = who
		}
	}
	if accepted < 200 || refused < 200 {
		t.Errorf("%d templates accepted, %d refused", accepted, refused)
	}
	for template, want := range map[string]bool{
		"{image}:{tag}/{container}": true, "{namespace}/{image}/{container}": true, "team/{label:app}": true, "{namespace}/{label:example.com/app}": true, "x-{pod}-y": true,
		"{namespace}-{pod}": false, "{namespace}.{pod}": false, "{image}{tag}": false, "{image}/{image}": false, "{label:a b}": false, "{label:/a}": false, "{label:}": false,
	} {
		_, err := Parse("x", []byte("apiVersion: syslatch.dev/v1\npolicies: [{name: a, match: {}, mode: record, workload: '"+template+"'}]"), Options{})
		if (err == nil) != want {
			t.Errorf("%s: %v", template, err)
		}
	}
}

// TestPatternsThatCannotMatch are mistakes, and not policies that nothing is
// under.
func TestPatternsThatCannotMatch(t *testing.T) {
	for _, match := range []string{"namespaces: ['payments ']", "namespaces: [' payments']", "images: ['nginx :1']", "containers: [\"a\\u00a0b\"]", "podLabels: {'app ': x}", "podLabels: {app/: x}", "podLabels: {app: 'x '}"} {
		if f, err := Parse("x", []byte("apiVersion: syslatch.dev/v1\npolicies: [{name: a, match: {"+match+"}, mode: record}]"), Options{}); err == nil {
			t.Errorf("%s: got %+v, want an error", match, f.Policies[0].Match)
		}
	}
	parsed(t, "apiVersion: syslatch.dev/v1\npolicies: [{name: a, match: {podLabels: {app.kubernetes.io/Name_1: '*', a: b}}, mode: record}]")
}

// A policy that the parser calls shadowed must never be the one that decides.
func FuzzShadowing(f *testing.F) {
	f.Add("a*", "abc", "abc")
	f.Add("*", "[a-c]", "b")
	f.Add(`\*`, "*", "x")
	f.Fuzz(func(t *testing.T, wide, narrow, name string) {
		if checkGlob(wide) != nil || checkGlob(narrow) != nil {
			return
		}
		if coversPattern(wide, narrow) && matchGlob(narrow, name) && !matchGlob(wide, name) {
			t.Errorf("%q is said to cover %q, but only the latter matches %q", wide, narrow, name)
		}
	})
}

func FuzzDecide(f *testing.F) {
	data, err := os.ReadFile("testdata/example.yaml")
	if err != nil {
		f.Fatal(err)
	}
	file := parsed(f, string(data))
	file.Policies = file.Policies[1:2]
	file.Policies[0].Match = Match{}
	f.Add("nginx:1", "c", "n", "api", "audit", "w")
	f.Add("a/b@sha256:0", "..", "\x00", "{image}", "", strings.Repeat("/", 2000))
	f.Fuzz(func(t *testing.T, image, name, namespace, label, mode, workload string) {
		d, err := file.Decide(Container{
			Image: image, Name: name, Namespace: namespace, PodLabels: map[string]string{"app": label},
			Annotations: map[string]string{AnnotationMode: mode, AnnotationWorkload + "/container." + name: workload},
		})
		if d.Failure != FailureDeny {
			t.Fatalf("failure policy %q, want deny", d.Failure)
		}
		if d.Mode != ModeEnforce && d.Mode != ModeAudit {
			t.Fatalf("mode %q was not allowed", d.Mode)
		}
		if err == nil && (checkWorkload(d.Workload) != nil || len(d.Workload) > MaxWorkloadSize) {
			t.Fatalf("workload %q", d.Workload)
		}
		for _, r := range d.Reasons {
			if strings.Contains(r, "\x00") {
				t.Fatalf("reason %q carries a NUL", r)
			}
		}
	})
}

// A policy with users matches these users' rootless containers, and nothing else;
// one without matches no rootless container: what else is known of them is their
// users' word. Their workloads are their own.
func TestDecideRootless(t *testing.T) {
	f := parsed(t, `
apiVersion: syslatch.dev/v1
hook: {rootless: {users: [alice, 1001, bob]}}
policies:
- name: root
  match: {images: [nginx]}
  mode: enforce
- name: alice
  match: {users: [alice], containers: [web]}
  mode: record
  annotations: [workload]
- name: others
  match: {users: ["100?"]}
  mode: enforce
  workload: "{container}"
- name: rest
  match: {}
  mode: audit
  annotations: [workload]
`)
	alice, other, bob := &User{1000, "alice"}, &User{UID: 1001}, &User{5, "bob"}
	own := func(workload string) map[string]string { return map[string]string{AnnotationWorkload: workload} }
	long := strings.Repeat("x", MaxWorkloadSize)
	for _, c := range []struct {
		c                      Container
		policy, workload, says string
	}{
		{Container{Name: "web", Image: "nginx"}, "root", "docker.io/library/nginx/web", ""},
		{Container{Name: "web", Image: "nginx", User: alice}, "alice", "user@1000/docker.io/library/nginx/web", ""},
		{Container{Name: "db", Image: "nginx", User: alice}, "others", "user@1000/db", ""},
		{Container{Name: "web", Image: "nginx", User: other}, "others", "user@1001/web", ""},
		{Container{Name: "web", Image: "nginx", User: bob}, "", "", ""}, // neither "root" nor "rest"
		{Container{Name: "web", Image: "nginx", User: alice, Annotations: own("nginx")}, "alice", "user@1000/nginx", ""},
		{Container{Name: "web", Image: "nginx", User: alice, Annotations: own("user@1001/web")}, "alice", "", "begins the workloads of rootless containers"},
		{Container{Name: "web", Image: "nginx", User: alice, Annotations: own("../x")}, "alice", "", `component ".."`},
		{Container{Name: "web", Image: "nginx", User: alice, Annotations: own(long)}, "alice", "", "longer than 512 bytes"},
		{Container{Name: "web", Image: "x", Annotations: own("user@1000/nginx")}, "rest", "", "begins the workloads of rootless containers"},
	} {
		d, err := f.Decide(c.c)
		if d.Policy != c.policy || d.Workload != c.workload || (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: got %q %q %v, want %q %q %q", c.c, d.Policy, d.Workload, err, c.policy, c.workload, c.says)
		}
	}
}

func TestAsks(t *testing.T) {
	for key, want := range map[string]bool{
		"syslatch.dev/mode": true, "syslatch.dev/x": true, AnnotationMode: true, AnnotationMode + "/pod": true,
		AnnotationTrace: false, "notsyslatch.dev/mode": false, "io.container.manager": false, "": false,
	} {
		if c := (Container{Annotations: map[string]string{key: ""}}); c.Asks() != want {
			t.Errorf("%q: got %v", key, !want)
		}
	}
}
