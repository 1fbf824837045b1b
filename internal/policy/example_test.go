// SPDX-License-Identifier: Apache-2.0

package policy_test

import (
	"fmt"

	"github.com/syslatch/syslatch/internal/policy"
)

func Example() {
	const text = `
apiVersion: syslatch.dev/v1
policies:
  - name: shop
    match: {namespaces: [shop]}
    mode: enforce
    annotations: [mode]
    allowedModes: [enforce, audit]
`
	file, err := policy.Parse("policy.yaml", []byte(text), policy.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	decision, err := file.Decide(policy.Container{
		Namespace: "shop", Name: "web", Image: "nginx:1.27",
		Annotations: map[string]string{"mode.syslatch.dev/container.web": "off"},
	})
	fmt.Println(decision.Mode, decision.Workload, decision.Failure, err)
	for _, reason := range decision.Reasons {
		fmt.Println("-", reason)
	}
	_, err = policy.Parse("policy.yaml", []byte("apiVersion: syslatch.dev/v1\npolicies: [{name: a, match: {}, mode: recrod}]"), policy.Options{})
	fmt.Println(err)
	// Output:
	// enforce docker.io/library/nginx/web deny <nil>
	// - policy shop matches
	// - annotation mode.syslatch.dev/container.web: off ignored: the policy allows enforce or audit
	// policy.yaml:2: policies[0].mode: unknown value "recrod", want off, record, audit or enforce (did you mean "record"?)
}
