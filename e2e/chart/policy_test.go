package chart_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/plugin/cel"
	"k8s.io/apiserver/pkg/admission/plugin/webhook/matchconditions"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/cel/environment"
)

const nmiAccount = "system:serviceaccount:kube-system:podidentity-nmi"

// tokenPolicy returns the policy that the chart renders from the values, and its binding.
func tokenPolicy(t *testing.T, values string) (*admissionv1.ValidatingAdmissionPolicy, *admissionv1.ValidatingAdmissionPolicyBinding) {
	t.Helper()
	got := render(t, values)
	if len(got.policies) != 1 || len(got.policyBindings) != 1 {
		t.Fatalf("want one policy and one binding: %+v, %+v", got.policies, got.policyBindings)
	}
	return got.policies[0], got.policyBindings[0]
}

func TestPolicyIsInstalledIfNMIMayRequestTokens(t *testing.T) {
	for values, want := range map[string]int{
		"{}":                                 0,
		"nmi: {secretNamespaces: all}":       0,
		"nmi: {federatedNamespaces: [shop]}": 1,
		"nmi: {federatedNamespaces: all}":    1,
		"nmi: {federatedNamespaces: all, tokenRequestPolicy: false}":   0,
		"{rbac: {enabled: false}, nmi: {federatedNamespaces: [shop]}}": 1,
		"nmi: {federatedNamespaces: all, uninstall: true}":             1,
	} {
		got := render(t, values)
		if len(got.policies) != want || len(got.policyBindings) != want {
			t.Errorf("%s: %d policies and %d bindings, want %d", values, len(got.policies), len(got.policyBindings), want)
		}
	}
}

func TestPolicyDeniesAndAppliesOnlyToTokensOfServiceAccounts(t *testing.T) {
	policy, binding := tokenPolicy(t, "nmi: {federatedNamespaces: [shop]}")
	want := &admissionv1.MatchResources{ResourceRules: []admissionv1.NamedRuleWithOperations{{
		RuleWithOperations: admissionv1.RuleWithOperations{
			Operations: []admissionv1.OperationType{admissionv1.Create},
			Rule: admissionv1.Rule{
				APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"serviceaccounts/token"},
			},
		},
	}}}
	if diff := cmp.Diff(want, policy.Spec.MatchConstraints); diff != "" {
		t.Errorf("match constraints (-want +got):\n%s", diff)
	}
	if policy.Spec.FailurePolicy == nil || *policy.Spec.FailurePolicy != admissionv1.Fail {
		t.Errorf("the failure policy is %v, want Fail", policy.Spec.FailurePolicy)
	}
	wantBinding := admissionv1.ValidatingAdmissionPolicyBindingSpec{
		PolicyName: policy.Name, ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny},
	}
	if diff := cmp.Diff(wantBinding, binding.Spec); diff != "" {
		t.Errorf("binding (-want +got):\n%s", diff)
	}
}

func TestPolicyAllowsNMIOnlyTokensForFederatedIdentities(t *testing.T) {
	policy, _ := tokenPolicy(t, "nmi: {federatedNamespaces: [shop]}")
	const (
		audience = "whose one audience is api://AzureADTokenExchange"
		bound    = "bound to a pod, given by apiVersion v1, kind Pod, name and uid"
		expiry   = "expire after at most 600 seconds"
	)
	for name, test := range map[string]struct {
		change func(*authenticationv1.TokenRequestSpec)
		want   []string
	}{
		"as NMI asks":         {func(*authenticationv1.TokenRequestSpec) {}, nil},
		"for the API server":  {func(s *authenticationv1.TokenRequestSpec) { s.Audiences = []string{"https://kubernetes.default.svc"} }, []string{audience}},
		"for another beside":  {func(s *authenticationv1.TokenRequestSpec) { s.Audiences = append(s.Audiences, "vault") }, []string{audience}},
		"for Entra ID twice":  {func(s *authenticationv1.TokenRequestSpec) { s.Audiences = append(s.Audiences, s.Audiences[0]) }, []string{audience}},
		"in another case":     {func(s *authenticationv1.TokenRequestSpec) { s.Audiences = []string{"api://azureadtokenexchange"} }, []string{audience}},
		"for nobody":          {func(s *authenticationv1.TokenRequestSpec) { s.Audiences = []string{} }, []string{audience}},
		"without an audience": {func(s *authenticationv1.TokenRequestSpec) { s.Audiences = nil }, []string{audience}},
		"not bound":           {func(s *authenticationv1.TokenRequestSpec) { s.BoundObjectRef = nil }, []string{bound}},
		"bound to nothing": {func(s *authenticationv1.TokenRequestSpec) {
			*s.BoundObjectRef = authenticationv1.BoundObjectReference{}
		}, []string{bound}},
		"bound to a Secret":     {func(s *authenticationv1.TokenRequestSpec) { s.BoundObjectRef.Kind = "Secret" }, []string{bound}},
		"bound to a Node":       {func(s *authenticationv1.TokenRequestSpec) { s.BoundObjectRef.Kind = "Node" }, []string{bound}},
		"of no version":         {func(s *authenticationv1.TokenRequestSpec) { s.BoundObjectRef.APIVersion = "" }, []string{bound}},
		"of another group":      {func(s *authenticationv1.TokenRequestSpec) { s.BoundObjectRef.APIVersion = "example.com/v1" }, []string{bound}},
		"of a pod without name": {func(s *authenticationv1.TokenRequestSpec) { s.BoundObjectRef.Name = "" }, []string{bound}},
		"of a pod of any uid":   {func(s *authenticationv1.TokenRequestSpec) { s.BoundObjectRef.UID = "" }, []string{bound}},
		"for an hour":           {func(s *authenticationv1.TokenRequestSpec) { s.ExpirationSeconds = new(int64(3600)) }, []string{expiry}},
		"a second too long":     {func(s *authenticationv1.TokenRequestSpec) { s.ExpirationSeconds = new(int64(601)) }, []string{expiry}},
		// The API server sets expirationSeconds to its default of one hour before it evaluates the policy, so the
		// policy never gets a request without expirationSeconds.
		"for no given time": {func(s *authenticationv1.TokenRequestSpec) { s.ExpirationSeconds = nil }, []string{"no such overload"}},
		"as kubectl does": {func(s *authenticationv1.TokenRequestSpec) {
			*s = authenticationv1.TokenRequestSpec{
				Audiences: []string{"https://kubernetes.default.svc"}, ExpirationSeconds: new(int64(3600)),
			}
		}, []string{audience, bound, expiry}},
	} {
		got := askPolicy(t, policy, nmiAccount, test.change)
		if len(got) != len(test.want) {
			t.Errorf("%s: the refusals of the policy are %q, want %q", name, got, test.want)
			continue
		}
		for i := range got {
			if !strings.Contains(got[i], test.want[i]) {
				t.Errorf("%s: refusal %d of the policy is %q, want %q", name, i, got[i], test.want[i])
			}
		}
	}
}

func TestPolicyAppliesOnlyToNMIsServiceAccount(t *testing.T) {
	const ofRelease = "nmi: {federatedNamespaces: all}"
	const ofAdministrator = "nmi: {federatedNamespaces: all, serviceAccount: {create: false, name: mine}}"
	anything := func(s *authenticationv1.TokenRequestSpec) { *s = authenticationv1.TokenRequestSpec{} }
	for _, test := range []struct {
		values, username string
		refused          bool
	}{
		{ofRelease, nmiAccount, true},
		{ofRelease, "system:node:node1", false},
		{ofRelease, "system:serviceaccount:shop:podidentity-nmi", false},
		{ofRelease, "system:serviceaccount:kube-system:other", false},
		{ofRelease, "system:anonymous", false},
		{"{fullnameOverride: other, nmi: {federatedNamespaces: all}}", "system:serviceaccount:kube-system:other-nmi", true},
		{ofAdministrator, "system:serviceaccount:kube-system:mine", true},
		{ofAdministrator, nmiAccount, false},
	} {
		policy, _ := tokenPolicy(t, test.values)
		if got := askPolicy(t, policy, test.username, anything); (len(got) > 0) != test.refused {
			t.Errorf("%s: the refusals of the policy for %s are %q, want refused = %v", test.values, test.username, got, test.refused)
		}
	}
}

// askPolicy returns the refusals of the policy for a token request of username: a request like NMI's, modified by
// change. It returns nil if the policy does not apply or allows the request. The API server's own code compiles and
// evaluates the expressions.
func askPolicy(t *testing.T, policy *admissionv1.ValidatingAdmissionPolicy, username string,
	change func(*authenticationv1.TokenRequestSpec)) []string {
	t.Helper()
	request := &authenticationv1.TokenRequest{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"},
		Spec: authenticationv1.TokenRequestSpec{
			Audiences:         []string{"api://AzureADTokenExchange"},
			ExpirationSeconds: new(int64(600)),
			BoundObjectRef: &authenticationv1.BoundObjectReference{
				APIVersion: "v1", Kind: "Pod", Name: "web-1", UID: "7c0f9bd5-5d3f-4a8e-9b1c-2f4c0c2a9f11",
			},
		},
	}
	change(&request.Spec)
	kind := authenticationv1.SchemeGroupVersion.WithKind("TokenRequest")
	resource := schema.GroupVersionResource{Version: "v1", Resource: "serviceaccounts"}
	attributes := &admission.VersionedAttributes{
		Attributes: admission.NewAttributesRecord(request, nil, kind, request.Namespace, request.Name, resource, "token",
			admission.Create, &metav1.CreateOptions{}, false, &user.DefaultInfo{Name: username}),
		VersionedKind:   kind,
		VersionedObject: admission.NewLazyObject(request),
	}

	conditions, validations := compilePolicy(t, policy)
	matched := matchconditions.NewMatcher(conditions, policy.Spec.FailurePolicy, "policy", "validate", policy.Name).
		Match(t.Context(), attributes, nil, nil)
	if matched.Error != nil {
		t.Fatalf("match conditions: %v", matched.Error)
	}
	if !matched.Matches {
		return nil
	}
	results, _, err := validations.ForInput(t.Context(), attributes,
		cel.CreateAdmissionRequest(attributes, metav1.GroupVersionResource(resource), metav1.GroupVersionKind(kind)),
		cel.OptionalVariableBindings{}, nil, celconfig.RuntimeCELCostBudget)
	if err != nil {
		t.Fatal(err)
	}
	var refusals []string
	for i, result := range results {
		switch {
		case result.Error != nil:
			refusals = append(refusals, result.Error.Error())
		case result.EvalResult.Value() != true:
			refusals = append(refusals, policy.Spec.Validations[i].Message)
		}
	}
	return refusals
}

// compilePolicy compiles the expressions of a policy as the API server does. It fails the test if a validation has no
// message, or another reason than Forbidden.
func compilePolicy(t *testing.T, policy *admissionv1.ValidatingAdmissionPolicy) (conditions, validations cel.ConditionEvaluator) {
	t.Helper()
	compiler, err := cel.NewCompositedCompiler(environment.MustBaseEnvSet(environment.DefaultCompatibilityVersion()))
	if err != nil {
		t.Fatal(err)
	}
	compile := func(expressions []cel.ExpressionAccessor) cel.ConditionEvaluator {
		evaluator := compiler.CompileCondition(expressions, cel.OptionalVariableDeclarations{}, environment.NewExpressions)
		if errs := evaluator.CompilationErrors(); len(errs) > 0 {
			t.Fatalf("the API server would refuse the policy: %v", errs)
		}
		return evaluator
	}
	var matching, validating []cel.ExpressionAccessor
	for _, condition := range policy.Spec.MatchConditions {
		matching = append(matching, (*matchconditions.MatchCondition)(&condition))
	}
	for _, validation := range policy.Spec.Validations {
		if validation.Message == "" || validation.Reason == nil || *validation.Reason != metav1.StatusReasonForbidden {
			t.Errorf("the validation %s has message %q and reason %v, want a message and the reason Forbidden", validation.Expression, validation.Message, validation.Reason)
		}
		validating = append(validating, &matchconditions.MatchCondition{Expression: validation.Expression})
	}
	return compile(matching), compile(validating)
}
