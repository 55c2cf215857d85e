-- How far two features fire together and point the same way, under a filter.
--
-- Grain:   one row.
-- Reads:   under_filter_of_feature, under_filter_total, stg_similar, jaccard_index, mutual_information
-- Units:   n_feature and n_other count the tokens at which each fires above the threshold, n_both those at which both
--          do, N all encoded tokens that the filter lets through. share_of_feature = n_both / n_feature, and
--          share_of_other likewise. jaccard = n_both / (n_feature + n_other - n_both); pmi = log2(n_both * N /
--          (n_feature * n_other)), in bits (null if they never meet). correlation is that of their values at the
--          tokens of n_both. cosine of their directions is null if neither is among the 50 nearest of the other. The
--          filter is that of feature_numbers.
-- Parameters: feature bigint, other bigint, source text = null, document_key text = null, since text = null,
--          until text = null, role text = null, threshold double = 0, with_feature bigint = null,
--          without_feature bigint = null
-- Ask it:  are features 12 and 34 one?  from feature_pair(12, 34)
create or replace macro feature_pair(
    feature,
    other,
    source := null,
    document_key := null,
    since := null,
    until := null,
    role := null,
    threshold := 0,
    with_feature := null,
    without_feature := null
) as table
with one as materialized (
    select token_id, value::double as value
    from under_filter_of_feature(
        feature, source, document_key, since, until, role, threshold, with_feature, without_feature
    )
    where passes
),
two as materialized (
    select token_id, value::double as value
    from under_filter_of_feature(
        other, source, document_key, since, until, role, threshold, with_feature, without_feature
    )
    where passes
),
counts as (
    select
        (select count(*) from one) as n_feature,
        (select count(*) from two) as n_other,
        count(*)                   as n_both,
        case when count(distinct one.value) > 1 and count(distinct two.value) > 1 then corr(one.value, two.value) end
            as correlation
    from one
    join two using (token_id)
)
select
    n_feature,
    n_other,
    n_both,
    n_both / nullif(n_feature, 0)                                                as share_of_feature,
    n_both / nullif(n_other, 0)                                                  as share_of_other,
    jaccard_index(n_both, n_feature, n_other)                                    as jaccard,
    case when n_both > 0 then mutual_information(n_both, n_feature, n_other, n_encoded) end as pmi,
    correlation,
    (
        select max(cosine)
        from stg_similar
        where (feature_id = feature and other_id = other) or (feature_id = other and other_id = feature)
    )                                                                            as cosine
from counts
cross join under_filter_total(source, document_key, since, until, role, with_feature, without_feature);
