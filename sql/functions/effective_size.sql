-- The number of tokens, drawn one by one, that would tell a share as well as the tokens of a sample of documents do.
--
-- Grain:   scalar.
-- Reads:   t_quantile
-- Units:   share is that of n_seen tokens in n_documents documents; squares is the sum over the documents of
--          (hits - share * tokens)^2. The variance of the share is n / (n - 1) * squares / n_seen^2, n documents: that
--          of a ratio estimator whose clusters are documents (Cochran 1977, chapter 6). The size is share * (1 - share)
--          / variance, at most n_seen, times the square of the quantiles normal / t with n - 1 degrees of freedom,
--          because the variance is estimated (Korn and Graubard 1998). Without any variance it is n_documents, times
--          that. Give it to share_low and share_high, with share * size hits.
-- Ask it:  select effective_size(0.5, 30.0, 100, 20)
create or replace macro effective_size(share, squares, n_seen, n_documents) as
case
    when (n_documents) > 1
        then case
            when (squares) > 1e-9 * (n_seen)
                then least(
                    (share) * (1 - (share)) * pow((n_seen)::double, 2)
                        * ((n_documents) - 1) / ((n_documents) * (squares)),
                    (n_seen)
                )
            else (n_documents)
        end * pow(1.96 / t_quantile(n_documents), 2)
    else 0.0
end;
