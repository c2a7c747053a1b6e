"""Does a hybrid say more, and still say it right? The paper's section 4 for models of one's own.

Models are asked (`models`, `server`, `local`), every answer is kept (`samples`), `tasks` measure what was kept, and
`report` and `page` show it. A task is one class.
"""
